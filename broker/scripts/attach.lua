-- Subscribes a gateway and returns the log in one step: no event can fall between the two, or come in both.
local request_id, gateway_id = unpack(ARGV)
local job = load_job(request_id)
if not job then return nil end
if not string.find('\n' .. job.subscribers .. '\n', '\n' .. gateway_id .. '\n', 1, true) then
  set_job(job, {subscribers = job.subscribers .. '\n' .. gateway_id})
end
return redis.call('XRANGE', events_key(request_id), '-', '+')

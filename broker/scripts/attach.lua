-- Subscribes a gateway and returns the log in one step: no event can fall between the two, or come in both.
local request_id, gateway_id = unpack(ARGV)
local job = load_job(request_id)
if not job then return nil end

local function with_gateway(names)
  if string.find('\n' .. names .. '\n', '\n' .. gateway_id .. '\n', 1, true) then return names end
  return names .. '\n' .. gateway_id
end

set_job(job, {subscribers = with_gateway(job.subscribers), followers = with_gateway(job.followers)})
return redis.call('XRANGE', events_key(request_id), '-', '+')

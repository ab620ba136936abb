-- Makes a worker the owner of the entries that it just read, and returns what it must run.
-- Calling it again with the same entries gives the same answer: a lost reply costs nothing.
-- `held` names what the worker already runs, as 'request_id attempt' lines: after a lost connection it reads its whole
-- pending list again, and must get back only what it never heard of.
local worker_id, model, count, held_text = unpack(ARGV, 1, 4)
go_on_without_memory()
local held = parse_held(held_text)

-- A part of what a worker asks for: it is topped up at every take, so a worker with much room reads a few times in a
-- row, and its rows join the running batch a step later at worst. A newcomer waits behind all that is ready.
local target = math.ceil(tonumber(count) / 4)
local known = tonumber(redis.call('GET', target_key(model)) or '0')
if target >= known and target > MIN_READY_DEPTH then redis.call('SET', target_key(model), target, 'PX', 60000) end

end_expired()
local deliveries = {}
for i = 5, #ARGV, 2 do
  local entry_id, place = ARGV[i], ARGV[i + 1]
  local job = resolve_entry(model, entry_id, place)
  if not job then
    drop_entry(model, entry_id)
  elseif job.state == 'running' then
    if job.worker == worker_id and not is_held(held, job) then
      if job.flag == 'cancelled' then
        end_request(job, 'cancelled', make_event('cancelled', job.id))
        settle_session(job.session)
      else
        deliveries[#deliveries + 1] = make_delivery(job)
      end
    end
  else
    start(job, worker_id, entry_id)
    deliveries[#deliveries + 1] = make_delivery(job)
  end
end
top_up(model)
return deliveries

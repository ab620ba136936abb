-- Takes over what other workers let idle for a whole lease: their owner is dead, hung or paused. Entries of the caller
-- itself count only if it doesn't know them (the reply that delivered them was lost). XAUTOCLAIM isn't used: it
-- returns nothing for a deleted entry and leaves it pending.
local DEAD_LENGTH = 1000
local DEAD_TTL_MS = 7 * 86400000

local worker_id, model, lease_ms, count, held_text = unpack(ARGV)
go_on_without_memory()
local held = parse_held(held_text)
local ready = ready_key(model)

local function end_lost(job)
  if job.flag == 'cancelled' then
    end_request(job, 'cancelled', make_event('cancelled', job.id))
  elseif job.session ~= '' then
    -- After a lease the picture is stale: the client sends its newest prompt instead.
    end_request(job, 'failed', make_failure(job.id, 'worker_lost', 'the worker that drew this was lost', true))
  elseif is_expired(job) then
    end_request(job, 'expired', make_event('expired', job.id))
  elseif job.attempt >= MAX_ATTEMPTS then
    redis.call('XADD', dead_key(), 'MAXLEN', '~', DEAD_LENGTH, '*', 'request_id', job.id, 'model', job.model,
               'owner', job.owner, 'worker', job.worker, 'attempts', job.attempt,
               'job', redis.call('HGET', job.key, 'job'))
    redis.call('PEXPIRE', dead_key(), DEAD_TTL_MS)
    end_request(job, 'failed', make_failure(job.id, 'attempts_exhausted',
                'each of ' .. job.attempt .. ' workers that tried this request was lost', false))
  else
    return false
  end
  settle_session(job.session)
  return true
end

local function take_over(job, entry_id)
  redis.call('XCLAIM', ready, GROUP, worker_id, 0, entry_id, 'JUSTID')
  start(job, worker_id, entry_id)
  return make_delivery(job)
end

-- XGROUP DELCONSUMER drops what is still pending, silently, so only a consumer without any may go.
local function remove_dead_consumers()
  local consumers = redis.pcall('XINFO', 'CONSUMERS', ready, GROUP)
  if consumers.err then return end
  for _, info in ipairs(consumers) do
    local name, num_pending, idle_ms = info[2], info[4], info[6]
    if num_pending == 0 and idle_ms > 10 * lease_ms and redis.call('EXISTS', worker_key(name)) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', ready, GROUP, name)
    end
  end
end

end_expired()
count_undelivered(model)  -- makes sure that the group exists
local deliveries = {}
for _, pending in ipairs(redis.call('XPENDING', ready, GROUP, 'IDLE', lease_ms, '-', '+', count + 100)) do
  if #deliveries >= tonumber(count) then break end
  local entry_id, former = pending[1], pending[2]
  local entry = redis.call('XRANGE', ready, entry_id, entry_id)[1]
  local job = entry and resolve_entry(model, entry_id, entry[2][2])
  local is_lost_by_other = former ~= worker_id
  if not job then
    drop_entry(model, entry_id)
  elseif is_lost_by_other or not is_held(held, job) then
    if job.state == 'queued' then
      -- Read by a worker that died before it could take it: nobody has tried it yet.
      deliveries[#deliveries + 1] = take_over(job, entry_id)
    else
      if is_lost_by_other then send_abort(former, job.id, 'lost') end
      if not end_lost(job) then deliveries[#deliveries + 1] = take_over(job, entry_id) end
    end
  end
end
remove_dead_consumers()
top_up(model)
return deliveries

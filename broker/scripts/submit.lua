-- Admission, record, place in line, Accepted: all or nothing. `request_id` is the key: a client that lost the reply
-- calls again and gets the first call's answer.
local job_json, ask = ARGV[1], cjson.decode(ARGV[2])
local model, lane, owner = ask.model, ask.lane, ask.owner
local deadline_at_ms = ask.deadline_ms and NOW_MS + ask.deadline_ms or 0

-- Predictions are off by about a tenth (benchmarks/admission.py), and a picture that comes just too late is work in vain.
local SAFETY = 1.15

-- How long the request runs: longer, the more others share its batch.
local function predict_run_ms()
  local fullness = math.min(1, (get_depth(model).running + 1) / math.max(1, ask.num_slots))
  return (ask.alone_ms + (ask.full_ms - ask.alone_ms) * fullness) / math.min(1, speed_of(model))
end

-- When a request that starts in `start_ms` is surely done.
local function predict_finish_ms(start_ms)
  return (start_ms + predict_run_ms()) * SAFETY
end

local function answer(outcome, job)
  local told = redis.call('HMGET', job.key, 'position', 'depth', 'start_ms')
  return {outcome, job.id, unpack(told)}
end


-- Another request that answers this one too: the first one of the same idempotency key, or one of the same caller for
-- the very same picture.

local function is_worth_joining(job)
  if job.state == 'completed' then return keeps_pictures(job) end
  return is_unfinished(job) and job.flag ~= 'cancelled'
end

-- A request must not end by the earlier deadline of another, nor wait beyond its own.
local function is_in_time(job)
  if job.state == 'completed' then return true end
  local ends_earlier = job.deadline_at_ms > 0 and (deadline_at_ms == 0 or deadline_at_ms > job.deadline_at_ms)
  if ends_earlier then return false end
  if not ask.deadline_ms or job.state == 'running' then return true end
  local start_ms = predict_start_ms(model, position_of(job), job.cost_us, job.num_slots)
  return predict_finish_ms(start_ms) <= ask.deadline_ms
end

local function find_repeated()
  local value = ask.idempotency_key and redis.call('GET', idempotency_key(owner, ask.idempotency_key))
  if not value then return nil end
  local request_id, fingerprint = string.match(value, '^(%S+) (%S+)$')
  local job = load_job(request_id)
  if not job or not is_worth_joining(job) then return nil end
  return job, fingerprint == ask.fingerprint and 'repeated' or 'conflict'
end

local function find_same()
  local request_id = ask.cache_key and redis.call('GET', same_key(ask.cache_key))
  local job = request_id and load_job(request_id)
  if not job or not is_worth_joining(job) or not is_in_time(job) then return nil end
  return job, job.state == 'completed' and 'cached' or 'joined'
end

-- The pointers of an unfinished request end with it; one to a finished result has the result's time of today.
local function point(job, pointer, value)
  if not is_unfinished(job) then
    redis.call('SET', pointer, value, 'PX', math.max(1, redis.call('PTTL', job.key)))
    return
  end
  redis.call('SET', pointer, value)
  set_job(job, {pointers = job.pointers .. '\n' .. pointer})
end

local function link_to(job)
  if not ask.idempotency_key then return end
  point(job, idempotency_key(owner, ask.idempotency_key), job.id .. ' ' .. ask.fingerprint)
end

local function join(job, outcome)
  if is_unfinished(job) then
    add_claim(job, ask.request_id)
    set_job(job, {keep_ms = math.max(job.keep_ms, ask.keep_ms), promise_ms = math.max(job.promise_ms, ask.promise_ms)})
  else
    promise_result(job, ask.keep_ms, ask.promise_ms)
  end
  if outcome ~= 'repeated' then link_to(job) end
  return answer(outcome, job)
end


-- Admission
local RETURN_SHARE = 0.25        -- who finds the queue full comes back when this part of it has been worked off
local MAX_SPREAD_MS = 60000

-- Those refused at the same moment are told to come back one after the other, as there will be room for each: `wait_ms`
-- from now at the earliest, and after all who were told before.
local function tell_when(wait_ms)
  local next_ms = tonumber(redis.call('GET', returns_key(model)) or '0')
  local at_ms = math.max(NOW_MS + wait_ms, math.min(next_ms, NOW_MS + wait_ms + MAX_SPREAD_MS))
  local taken_ms = ask.cost_us / 1000 / speed_of(model)
  redis.call('SET', returns_key(model), at_ms + taken_ms, 'PX', math.ceil(at_ms + taken_ms - NOW_MS) + 1000)
  return math.ceil(at_ms - NOW_MS)
end

local function refuse(num_replaced)
  local depth = get_depth(model)
  if depth.queued + depth.running - num_replaced >= ask.max_depth then
    return {'full', depth.queued + depth.running, tell_when(depth.queued_us / 1000 / speed_of(model) * RETURN_SHARE)}
  end
  if ask.keep_ms > 0 and not ask.session then
    local kept_bytes = make_room(ask.max_result_bytes)
    if kept_bytes >= ask.max_result_bytes then return {'store_full', kept_bytes, time_to_room_ms(ask.max_result_bytes)} end
  end
  return nil
end

local function predict()
  local position = count_before(model, lane, owner, redis.call('LLEN', line_key(lane, model, owner)), ask.cost_us)
  return position, predict_start_ms(model, position, ask.cost_us, ask.num_slots)
end


-- A place for it

local function place_in_session(job, session, older)
  redis.call('PERSIST', session.key)
  if older then end_request(older, 'superseded', make_event('superseded', older.id, {by = job.id})) end
  set_session(session, {waiting = job.id})
  if is_running(session.running) then
    -- Parked: it gets a place when the running one ends. Whether stopping that one is worth it, its worker knows.
    local running = load_job(session.running)
    local last_ms = tonumber(session.last_final_ms)
    send_abort(running.worker, running.id, 'newer', last_ms and NOW_MS - last_ms or '')
    return
  end
  set_session(session, {running = ''})
  local is_same_line = session.model == model and session.lane == lane and session.owner == owner
  if session.place == '' or not is_same_line then
    leave_line(session)
    place_session(session, job)
  end
  -- Else it inherits the older one's place, in the line or already in the ready stream.
end

local function write_record()
  redis.call('HSET', job_key(ask.request_id), 'job', job_json, 'model', model, 'lane', lane, 'owner', owner,
             'session', ask.session or '', 'state', 'queued', 'attempt', 0, 'created_us', string.format('%.0f', NOW_US),
             'deadline_at_ms', deadline_at_ms, 'keep_ms', ask.keep_ms, 'promise_ms', ask.promise_ms,
             'cache_ms', ask.cache_ms, 'cost_us', ask.cost_us, 'num_slots', ask.num_slots,
             'subscribers', ask.gateway_id or '', 'claims', ask.request_id)
  return load_job(ask.request_id)
end


local known = load_job(ask.request_id)
if known then return answer('new', known) end
end_expired()
local twin, outcome = find_repeated()
if not twin then twin, outcome = find_same() end
if outcome == 'conflict' then return {'conflict'} end
if twin then return join(twin, outcome) end

local session = ask.session and load_session(ask.session) or nil
local older = session and session.waiting ~= '' and load_job(session.waiting) or nil
local num_replaced = older and older.model == model and 1 or 0
local refusal = refuse(num_replaced)
if refusal then return refusal end
local position, start_ms = predict()
-- A session's newest takes over the place of an older one, so its wait is not that of a new place.
local is_alone = not session or (session.place == '' and session.running == '')
local finish_ms = predict_finish_ms(start_ms)
if ask.deadline_ms and is_alone and finish_ms > ask.deadline_ms then
  return {'late', math.ceil(finish_ms), tell_when(finish_ms - ask.deadline_ms)}
end

set_weight(owner, ask.weight)
local job = write_record()
change_depth(job, 'queued', 1)
note_busy(model, ask.num_slots)
if deadline_at_ms > 0 then redis.call('ZADD', deadlines_key(), deadline_at_ms, job.id) end
link_to(job)
if ask.cache_key then point(job, same_key(ask.cache_key), job.id) end
local accepted = make_event('accepted', job.id)
append_event(job, accepted, accepted)
if session then place_in_session(job, session, older) else place_request(job) end
if session then position = position_of(job) end
top_up(model)
local depth = get_depth(model)
redis.call('HSET', job.key, 'position', position, 'depth', depth.queued + depth.running, 'start_ms', math.ceil(start_ms))
return answer('new', job)

-- The life of a request: its place, its start, its callers, its one ending.

local MAX_ATTEMPTS = 3
local STATES_TTL_MS = 60000      -- how long a log without pictures outlives its request
local SESSION_TTL_MS = 600000

local function place_request(job, to_front)
  set_job(job, {entry_id = ''})
  push_place(job.model, job.lane, job.owner, 'r:' .. job.id, to_front)
end

local function place_session(session, job, to_front)
  set_session(session, {place = 'line', entry_id = '', model = job.model, lane = job.lane, owner = job.owner})
  push_place(job.model, job.lane, job.owner, 's:' .. session.name, to_front)
end

-- A place that is already in the ready stream stays there: an undelivered entry is never deleted (the group's lag
-- would be unknown from then on). Whoever reads it finds nothing waiting and drops it, or a newer prompt takes it over.
local function leave_line(session)
  if session.place ~= 'line' then return end
  remove_place(session.model, session.lane, session.owner, 's:' .. session.name)
  set_session(session, {place = ''})
end

local function is_running(request_id)
  return request_id ~= '' and redis.call('HGET', job_key(request_id), 'state') == 'running'
end

-- After anything ended: gives a parked request its place, and lets an idle session's record expire.
-- The parked one joins at the end of its owner's line: at the front, one person who never stops typing would shut out
-- every other session of the same owner. A session alone in its line is first either way.
local function settle_session(name, to_front)
  if name == '' then return end
  local session = load_session(name)
  if session.running ~= '' then return end
  local parked = session.waiting ~= '' and load_job(session.waiting) or nil
  if not parked then
    redis.call('PEXPIRE', session.key, SESSION_TTL_MS)
  elseif session.place == '' then
    place_session(session, parked, to_front)
  end
end

local function forget_in_session(job)
  local session = load_session(job.session)
  if session.running == job.id then set_session(session, {running = ''}) end
  if session.waiting == job.id then set_session(session, {waiting = ''}) end
end


-- The one door out of the queue: every ending, good or bad, passes here, once.
-- A running request's entry is acknowledged and deleted. The caller settles the session and tops up.
local function end_request(job, state, fields)
  if state == 'completed' then drop_preview(job) end
  local logged = keeps_pictures(job) and fields or {'event', fields[2]}
  append_event(job, fields, logged)
  if job.state == 'running' then
    -- What was stopped was half done, as far as anyone knows.
    note_finished(job, state == 'completed' and 1 or 0.5)
    drop_entry(job.model, job.entry_id)
  end
  change_depth(job, job.state, -1)
  set_job(job, {state = state, finished_by = job.worker, ended_ms = NOW_MS})
  if job.session ~= '' then forget_in_session(job) end
  if job.deadline_at_ms > 0 then redis.call('ZREM', deadlines_key(), job.id) end
  if state ~= 'completed' then drop_pointers(job) end
  if keeps_pictures(job) then
    if state ~= 'completed' then job.cache_ms = 0 end
    store_result(job, size_of(logged) + job.preview_bytes)
  else
    keep_for(job, job.keep_ms > 0 and job.keep_ms or STATES_TTL_MS)
  end
end

-- Ends a queued request wherever it stands: in a line, parked, or in the ready stream.
local function end_queued(job, state)
  if job.session ~= '' then
    leave_line(load_session(job.session))
  elseif job.entry_id == '' then
    remove_place(job.model, job.lane, job.owner, 'r:' .. job.id)
  end
  end_request(job, state, make_event(state, job.id))
  settle_session(job.session)
end

-- Expired requests would else count as depth, and their callers wait, until a worker reads that far.
local function end_expired()
  for _, request_id in ipairs(redis.call('ZRANGEBYSCORE', deadlines_key(), '-inf', NOW_MS, 'LIMIT', 0, 50)) do
    local job = load_job(request_id)
    if job and job.state == 'queued' then end_queued(job, 'expired') end
    redis.call('ZREM', deadlines_key(), request_id)
  end
end

-- Queued: ends now. Running: its worker is told, and the flag stays for whoever takes over if that worker is dead.
local function cancel_request(job)
  if job.state == 'queued' then
    end_queued(job, 'cancelled')
  elseif job.state == 'running' then
    set_job(job, {flag = 'cancelled'})
    send_abort(job.worker, job.id, 'cancelled')
  end
  return job.state
end


-- Claims: the callers that want a request. Several may share one; it is cancelled when the last has given up.

local function add_claim(job, claim)
  if string.find('\n' .. job.claims .. '\n', '\n' .. claim .. '\n', 1, true) then return end
  set_job(job, {claims = job.claims .. '\n' .. claim})
end

-- Whether nobody is left.
local function give_up(job, claim)
  local left = {}
  for other in string.gmatch(job.claims, '[^\n]+') do
    if other ~= claim then left[#left + 1] = other end
  end
  set_job(job, {claims = table.concat(left, '\n')})
  return #left == 0
end


-- Taking

local function is_expired(job)
  return job.deadline_at_ms > 0 and job.deadline_at_ms <= NOW_MS
end

-- The model counts too: two streams may well give the same id in the same millisecond.
local function find_by_entry(model, entry_id, place)
  local kind, name = string.sub(place, 1, 2), string.sub(place, 3)
  if kind == 'r:' then
    local job = load_job(name)
    local is_current = job and job.entry_id == entry_id and (job.state == 'queued' or job.state == 'running')
    return is_current and job or nil
  end
  if kind ~= 's:' then return nil end
  local session = load_session(name)
  if is_running(session.running) then
    local job = load_job(session.running)
    return job.entry_id == entry_id and job.model == model and job or nil
  end
  if session.place ~= 'ready' or session.entry_id ~= entry_id or session.model ~= model then return nil end
  if session.waiting ~= '' then return load_job(session.waiting) end
  set_session(session, {place = '', entry_id = ''})
  redis.call('PEXPIRE', session.key, SESSION_TTL_MS)
  return nil
end

-- The request that an entry of the ready stream stands for now; nil when it stands for nothing any more.
local function resolve_entry(model, entry_id, place)
  local job = find_by_entry(model, entry_id, place)
  if not job or job.state ~= 'queued' or not is_expired(job) then return job end
  end_queued(job, 'expired')
  return find_by_entry(model, entry_id, place)
end

-- Makes `worker_id` the owner. An attempt counts here and only here: when the owner changes.
local function start(job, worker_id, entry_id)
  if job.state == 'queued' then
    change_depth(job, 'running', 1)
    change_depth(job, 'queued', -1)
  end
  set_job(job, {state = 'running', worker = worker_id, entry_id = entry_id, attempt = job.attempt + 1,
                taken_ms = NOW_MS})
  if job.session ~= '' then
    set_session(load_session(job.session), {running = job.id, waiting = '', place = '', entry_id = ''})
  end
  local fields = make_event('started', job.id, {worker_id = worker_id, attempt = job.attempt})
  append_event(job, fields, fields)
end

local function make_delivery(job)
  local waited_ms = string.format('%.3f', (NOW_US - job.created_us) / 1000)
  return {job.id, redis.call('HGET', job.key, 'job'), job.attempt, waited_ms, job.attempt >= MAX_ATTEMPTS and 1 or 0}
end

local function parse_held(text)
  local held = {}
  for item in string.gmatch(text, '[^\n]+') do held[item] = true end
  return held
end

local function is_held(held, job)
  return held[job.id .. ' ' .. job.attempt]
end


local function position_of(job)
  if job.state ~= 'queued' then return 0 end
  local place, spot, entry_id = 'r:' .. job.id, job, job.entry_id
  if job.session ~= '' then
    spot = load_session(job.session)
    if spot.place == '' then return 0 end
    place, entry_id = 's:' .. job.session, spot.entry_id
  end
  if entry_id ~= '' then
    local pending = redis.pcall('XPENDING', ready_key(job.model), GROUP)
    if pending.err then return 0 end
    return math.max(0, #redis.call('XRANGE', ready_key(job.model), '-', entry_id) - 1 - pending[1])
  end
  local index = redis.call('LPOS', line_key(spot.lane, spot.model, spot.owner), place) or 0
  return count_before(spot.model, spot.lane, spot.owner, index, job.cost_us)
end

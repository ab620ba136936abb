-- Admission, record, place in line, Accepted: all or nothing. `request_id` is the key: a client that lost the reply
-- calls again and gets the first call's answer. (Idempotency keys and deadline admission belong at the marked spot.)
local request_id, job_json, model, lane, owner, gateway_id, session_name = unpack(ARGV, 1, 7)
local keep_ms, deadline_ms, max_depth, max_result_bytes = unpack(ARGV, 8, 11)

local answer = redis.call('HMGET', job_key(request_id), 'position', 'depth')
if answer[1] then return {'accepted', answer[1], answer[2]} end

end_expired()
local session = session_name ~= '' and load_session(session_name) or nil
local older = session and session.waiting ~= '' and load_job(session.waiting) or nil

-- Admission: limits here; an idempotency key's owner and the predicted wait against the deadline later.
local counts = redis.call('HMGET', depth_key(model), 'queued', 'running')
local depth = tonumber(counts[1] or '0') + tonumber(counts[2] or '0')
local num_replaced = older and older.model == model and 1 or 0
if depth - num_replaced >= tonumber(max_depth) then return {'full', depth} end
if tonumber(keep_ms) > 0 and session_name == '' then
  purge_kept()
  local kept_bytes = tonumber(redis.call('GET', kept_bytes_key()) or '0')
  if kept_bytes >= tonumber(max_result_bytes) then return {'store_full', kept_bytes} end
end

local deadline_at_ms = deadline_ms ~= '' and NOW_MS + tonumber(deadline_ms) or 0
redis.call('HSET', job_key(request_id), 'job', job_json, 'model', model, 'lane', lane, 'owner', owner,
           'session', session_name, 'state', 'queued', 'attempt', 0, 'created_us', string.format('%.0f', NOW_US),
           'deadline_at_ms', deadline_at_ms, 'keep_ms', keep_ms, 'subscribers', gateway_id)
local job = load_job(request_id)
change_depth(model, 'queued', 1)
if deadline_at_ms > 0 then redis.call('ZADD', deadlines_key(), deadline_at_ms, request_id) end
local accepted = make_event('accepted', request_id)
append_event(job, accepted, accepted)

if not session then
  place_request(job)
else
  redis.call('PERSIST', session.key)
  if older then end_request(older, 'superseded', make_event('superseded', older.id, {by = request_id})) end
  set_session(session, {waiting = request_id})
  if is_running(session.running) then
    -- Parked: it gets a place when the running one ends. Whether stopping that one is worth it, its worker knows.
    local running = load_job(session.running)
    local last_ms = tonumber(session.last_final_ms)
    send_abort(running.worker, running.id, 'newer', last_ms and NOW_MS - last_ms or '')
  else
    set_session(session, {running = ''})
    local is_same_line = session.model == model and session.lane == lane and session.owner == owner
    if session.place == '' or not is_same_line then
      leave_line(session)
      place_session(session, job)
    end
    -- Else it inherits the older one's place, in the line or already in the ready stream.
  end
end

local position = position_of(job)
top_up(model)
depth = depth + 1 - num_replaced
redis.call('HSET', job.key, 'position', position, 'depth', depth)
return {'accepted', position, depth}

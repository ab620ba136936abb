-- Stores, publishes, acknowledges and deletes, if the caller still owns the request. Returns 1 when the ending is the
-- caller's: also when it asks again because the first reply was lost. A worker that lost its lease gets 0.
local worker_id, request_id, state = unpack(ARGV, 1, 3)
go_on_without_memory()
local job = load_job(request_id)
if not job then return 0 end
if job.state ~= 'running' then
  return job.state == state and job.finished_by == worker_id and 1 or 0
end
if job.worker ~= worker_id then return 0 end

local fields = {unpack(ARGV, 4)}
if job.session ~= '' then
  local session = load_session(job.session)
  if state == 'completed' then set_session(session, {last_final_ms = NOW_MS}) end
  if state == 'superseded' and session.waiting ~= '' then
    fields = make_event('superseded', job.id, {by = session.waiting})
  end
end
end_request(job, state, fields)
settle_session(job.session)
top_up(job.model)
return 1

-- A drain: what the worker didn't finish goes back to the front of its line. The attempt doesn't count, because nothing
-- went wrong with the request. The old entry is deleted: a place that comes back is a new entry.
local worker_id = ARGV[1]
go_on_without_memory()

local function return_to_line(job)
  local entry_id = job.entry_id
  set_job(job, {state = 'queued', worker = '', entry_id = '', attempt = math.max(0, job.attempt - 1)})
  change_depth(job, 'queued', 1)
  change_depth(job, 'running', -1)
  drop_entry(job.model, entry_id)
end

local function return_to_session(job)
  local session = load_session(job.session)
  set_session(session, {running = ''})
  if session.waiting == '' then
    set_session(session, {waiting = job.id})
  else
    end_request(job, 'superseded', make_event('superseded', job.id, {by = session.waiting}))
  end
  settle_session(job.session, true)
end

-- From the last to the first, each to the front: they keep their order.
local models = {}
for i = #ARGV, 2, -1 do
  local job = load_job(ARGV[i])
  if job and job.state == 'running' and job.worker == worker_id then
    local ending = job.flag == 'cancelled' and 'cancelled' or is_expired(job) and 'expired' or nil
    if ending then
      end_request(job, ending, make_event(ending, job.id))
      settle_session(job.session)
    else
      return_to_line(job)
      refund(job.model, job.lane, job.owner, job.cost_us)
      if job.session ~= '' then return_to_session(job) else place_request(job, true) end
    end
    models[job.model] = true
  end
end
for model in pairs(models) do top_up(model) end
return 1

-- Cancels a request; with a claim only if its caller was the last that wants it. Returns the state after, nil when it is
-- unknown. What has ended stays as it is.
local request_id, claim = unpack(ARGV)
go_on_without_memory()
local job = load_job(request_id)
if not job then return nil end
if claim ~= '' and is_unfinished(job) and not give_up(job, claim) then return job.state end
return cancel_request(job)

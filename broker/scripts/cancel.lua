-- One caller gives a request up; it is cancelled with the last of them. Returns the state after, nil when it is unknown.
-- Without a claim the oldest goes: then whoever asks for the cancellation isn't one of those that wait.
-- What has ended stays as it is.
local request_id, claim = unpack(ARGV)
go_on_without_memory()
local job = load_job(request_id)
if not job then return nil end
if is_unfinished(job) and not give_up(job, claim) then return job.state end
return cancel_request(job)

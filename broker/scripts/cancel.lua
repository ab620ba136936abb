-- Cancels one request and returns its state after; nil when it is unknown. What has ended stays as it is.
go_on_without_memory()
local job = load_job(ARGV[1])
if not job then return nil end
return cancel_request(job)

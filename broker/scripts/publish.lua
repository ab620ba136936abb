-- A preview, from the owner only. It replaces the former one in the log: nobody who comes later wants the old ones.
-- `mark` tells a repeated call (its reply was lost) from a new preview.
local worker_id, request_id, mark = unpack(ARGV, 1, 3)
local job = load_job(request_id)
if not job or job.state ~= 'running' or job.worker ~= worker_id then return 0 end
mark = job.attempt .. ':' .. mark
if job.preview_mark == mark then return 1 end
local fields = {unpack(ARGV, 4)}
drop_preview(job)
if keeps_pictures(job) then
  append_event(job, fields, fields)
  set_job(job, {preview_seq = job.seq, preview_bytes = size_of(fields), preview_mark = mark})
else
  append_event(job, fields)
  set_job(job, {preview_mark = mark})
end
return 1

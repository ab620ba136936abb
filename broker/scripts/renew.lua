-- Resets the idle time of the entries that the caller owns, and says for each request 'renewed', 'cancelled' (renewed,
-- but someone wants it stopped) or 'lost'. Without the check of the owner a paused worker that wakes up would steal
-- its entries back: XCLAIM asks nobody. JUSTID leaves Redis' own delivery count alone.
local worker_id = ARGV[1]
local verdicts = {}
for i = 2, #ARGV do
  local job = load_job(ARGV[i])
  local verdict = 'lost'
  if job and job.state == 'running' and job.worker == worker_id then
    local claimed = redis.call('XCLAIM', ready_key(job.model), GROUP, worker_id, 0, job.entry_id, 'JUSTID')
    if #claimed == 1 then verdict = job.flag == 'cancelled' and 'cancelled' or 'renewed' end
  end
  verdicts[#verdicts + 1] = {ARGV[i], verdict}
end
return verdicts

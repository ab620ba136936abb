-- A request as it is now, with its log.
local job = load_job(ARGV[1])
if not job then return nil end
return {redis.call('HGET', job.key, 'job'), job.state, string.format('%.0f', job.created_us), job.attempt,
        position_of(job), redis.call('XRANGE', events_key(job.id), '-', '+')}

-- A request as it is now, with its log.
end_expired()
local job = load_job(ARGV[1])
if not job then return nil end
local position = position_of(job)
local start_ms = job.state == 'queued' and predict_start_ms(job.model, position, job.cost_us, job.num_slots) or 0
return {redis.call('HGET', job.key, 'job'), job.state, string.format('%.0f', job.created_us), job.attempt,
        position, math.ceil(start_ms), redis.call('XRANGE', events_key(job.id), '-', '+')}

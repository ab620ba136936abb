-- A worker says goodbye. Its consumer goes too, but never with entries still pending: XGROUP DELCONSUMER would drop
-- them silently, and nobody would ever reclaim them.
local worker_id = ARGV[1]
redis.call('DEL', worker_key(worker_id), control_key(worker_id))
redis.call('ZREM', workers_key(), worker_id)
for _, model in ipairs(redis.call('SMEMBERS', models_key())) do
  local pending = redis.pcall('XPENDING', ready_key(model), GROUP, '-', '+', 1, worker_id)
  if not pending.err and #pending == 0 then redis.call('XGROUP', 'DELCONSUMER', ready_key(model), GROUP, worker_id) end
end
return 1

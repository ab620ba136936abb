-- A worker's heartbeat: what it is and holds, until `ttl_ms` from now.
local worker_id, info, ttl_ms = unpack(ARGV)
redis.call('SET', worker_key(worker_id), info, 'PX', ttl_ms)
redis.call('ZREMRANGEBYSCORE', workers_key(), '-inf', NOW_MS)
redis.call('ZADD', workers_key(), NOW_MS + ttl_ms, worker_id)
redis.call('PEXPIREAT', workers_key(), tonumber(redis.call('ZRANGE', workers_key(), -1, -1, 'WITHSCORES')[2]) + 1000)
return 1

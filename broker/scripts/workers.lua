-- What the live workers say of themselves.
local infos = {}
for _, worker_id in ipairs(redis.call('ZRANGEBYSCORE', workers_key(), NOW_MS, '+inf')) do
  infos[#infos + 1] = redis.call('GET', worker_key(worker_id)) or nil
end
return infos

-- Kept results: for how long, and within which budget of bytes.
-- Two sorted sets of 'request_id:bytes': `kept` by the time at which a result ends, `spare` by the time from which it is
-- promised to nobody. From then on it stays while there is room, and the longest unused goes first.

local function get_kept_bytes()
  return tonumber(redis.call('GET', kept_bytes_key()) or '0')
end

local function forget_result(member)
  redis.call('ZREM', kept_key(), member)
  redis.call('ZREM', spare_key(), member)
  redis.call('DECRBY', kept_bytes_key(), string.match(member, ':(%d+)$'))
end

local function purge_kept()
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', kept_key(), '-inf', NOW_MS, 'LIMIT', 0, 200)) do
    forget_result(member)
  end
  -- Only where there is something to delete: a script that has written is never refused for want of memory.
  if redis.call('EXISTS', kept_key()) == 0 and redis.call('EXISTS', kept_bytes_key()) == 1 then
    redis.call('DEL', kept_bytes_key())
  end
end

-- Pointers lead from an idempotency key, or from what was asked for, to the request that answers it.
local function each_pointer(job)
  return string.gmatch(job.pointers, '[^\n]+')
end

local function points_to(pointer, job)
  local value = redis.call('GET', pointer)
  return value and string.match(value, '^%S+') == job.id
end

local function drop_pointers(job)
  for pointer in each_pointer(job) do
    if points_to(pointer, job) then redis.call('DEL', pointer) end
  end
end

local function keep_for(job, ttl_ms)
  redis.call('PEXPIRE', job.key, ttl_ms)
  redis.call('PEXPIRE', events_key(job.id), ttl_ms)
  for pointer in each_pointer(job) do
    if points_to(pointer, job) then redis.call('PEXPIRE', pointer, ttl_ms) end
  end
end

-- All three end at the same moment, after the last result: a counter can't outlive what it counts.
local function expire_budget()
  local last = redis.call('ZRANGE', kept_key(), -1, -1, 'WITHSCORES')
  for _, key in ipairs({kept_key(), spare_key(), kept_bytes_key()}) do
    redis.call('PEXPIREAT', key, tonumber(last[2]) + 1000)
  end
end

-- Keeps a finished result for `keep_ms` from now, and promises it for `promise_ms` of that.
local function promise_result(job, keep_ms, promise_ms)
  local ttl_ms = math.max(keep_ms, job.cache_ms, redis.call('PTTL', job.key))
  local member = job.id .. ':' .. job.result_bytes
  local promised_ms = tonumber(redis.call('ZSCORE', spare_key(), member) or '0')
  if redis.call('ZADD', kept_key(), NOW_MS + ttl_ms, member) == 1 then
    redis.call('INCRBY', kept_bytes_key(), job.result_bytes)
  end
  redis.call('ZADD', spare_key(), math.max(promised_ms, NOW_MS + promise_ms), member)
  keep_for(job, ttl_ms)
  expire_budget()
end

local function store_result(job, num_bytes)
  purge_kept()
  set_job(job, {result_bytes = num_bytes})
  promise_result(job, job.keep_ms, job.promise_ms)
end

-- Drops what nobody was promised until there is room, and returns the bytes that are kept after that.
local function make_room(max_bytes)
  purge_kept()
  if get_kept_bytes() < max_bytes then return get_kept_bytes() end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', spare_key(), '-inf', NOW_MS, 'LIMIT', 0, 100)) do
    local job = load_job(string.match(member, '^(.*):%d+$'))
    if job then
      drop_pointers(job)
      redis.call('DEL', job.key, events_key(job.id))
    end
    forget_result(member)
    if get_kept_bytes() < max_bytes then break end
  end
  return get_kept_bytes()
end

-- How long until promises end that hold the bytes above the budget.
local function time_to_room_ms(max_bytes)
  local excess, wait_ms = get_kept_bytes() - max_bytes, 0
  local promises = redis.call('ZRANGE', spare_key(), 0, 199, 'WITHSCORES')
  for i = 1, #promises, 2 do
    if excess < 0 then break end
    excess = excess - tonumber(string.match(promises[i], ':(%d+)$'))
    wait_ms = tonumber(promises[i + 1]) - NOW_MS
  end
  return math.max(0, wait_ms)
end

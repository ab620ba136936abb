-- What the scripts share, in five files. Python puts the key functions (keys.py) and these before each script.
-- A script is one decision: Redis runs it whole or not at all, so no other client ever sees half of it.

-- Hosts disagree about the time, so only Redis' clock counts. Scripts replicate their effects: TIME is allowed here.
local clock = redis.call('TIME')
local NOW_US = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local NOW_MS = math.floor(NOW_US / 1000)

-- When its memory is full, Redis refuses a script's writes unless the script has written before. Submitting should be
-- refused then, but what takes work out of the queue must go on: this write does nothing and is never refused.
local function go_on_without_memory()
  redis.call('PERSIST', models_key())
end


-- Requests and sessions as tables; `set_job` and `set_session` write through.

local JOB_FIELDS = {'state', 'model', 'lane', 'owner', 'session', 'worker', 'entry_id', 'subscribers', 'followers',
                    'flag', 'finished_by', 'preview_mark', 'claims', 'pointers',
                    'attempt', 'seq', 'created_us', 'deadline_at_ms', 'keep_ms', 'promise_ms', 'cache_ms', 'cost_us', 'num_slots',
                    'result_bytes', 'preview_seq', 'preview_bytes'}
local NUM_TEXT_FIELDS = 14

local function load_job(request_id)
  local job = {id = request_id, key = job_key(request_id)}
  local values = redis.call('HMGET', job.key, unpack(JOB_FIELDS))
  if not values[1] then return nil end
  for i, field in ipairs(JOB_FIELDS) do
    if i <= NUM_TEXT_FIELDS then job[field] = values[i] or '' else job[field] = tonumber(values[i] or '0') end
  end
  return job
end

local function set_job(job, fields)
  local flat = {}
  for field, value in pairs(fields) do
    job[field] = value
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  redis.call('HSET', job.key, unpack(flat))
end

local SESSION_FIELDS = {'running', 'waiting', 'place', 'entry_id', 'model', 'lane', 'owner', 'last_final_ms'}

-- `place` is '' (none), 'line' or 'ready'; model, lane and owner say whose line it is.
local function load_session(name)
  local values = redis.call('HMGET', session_key(name), unpack(SESSION_FIELDS))
  local session = {name = name, key = session_key(name)}
  for i, field in ipairs(SESSION_FIELDS) do session[field] = values[i] or '' end
  return session
end

local set_session = set_job

local function is_unfinished(job)
  return job.state == 'queued' or job.state == 'running'
end


-- How much is unfinished, and how much work waits.

local function get_depth(model)
  local counts = redis.call('HMGET', depth_key(model), 'queued', 'running', 'queued_us')
  return {queued = tonumber(counts[1] or '0'), running = tonumber(counts[2] or '0'),
          queued_us = tonumber(counts[3] or '0')}
end

local function change_depth(job, state, change)
  local key = depth_key(job.model)
  if state == 'queued' then redis.call('HINCRBY', key, 'queued_us', change * job.cost_us) end
  if redis.call('HINCRBY', key, state, change) > 0 then return end
  -- Nothing waits any more: from here on time says nothing of the workers' pace (see _lines).
  if state == 'queued' and redis.call('EXISTS', pace_key(job.model)) == 1 then
    redis.call('HSET', pace_key(job.model), 'busy_since_us', 0)
  end
  local depth = get_depth(job.model)
  if depth.queued <= 0 and depth.running <= 0 then redis.call('DEL', key) end
end

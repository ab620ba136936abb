-- What the scripts share, in four files. Python puts the key functions (keys.py) and these before each script.
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
                    'flag', 'finished_by', 'attempt', 'seq', 'created_us', 'deadline_at_ms', 'keep_ms', 'preview_seq',
                    'preview_bytes', 'preview_mark'}
local NUM_TEXT_FIELDS = 11

local function load_job(request_id)
  local values = redis.call('HMGET', job_key(request_id), unpack(JOB_FIELDS))
  if not values[1] then return nil end
  local job = {id = request_id, key = job_key(request_id)}
  for i, field in ipairs(JOB_FIELDS) do
    if i <= NUM_TEXT_FIELDS or field == 'preview_mark' then
      job[field] = values[i] or ''
    else
      job[field] = tonumber(values[i] or '0')
    end
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

local function change_depth(model, state, change)
  if redis.call('HINCRBY', depth_key(model), state, change) > 0 then return end
  local counts = redis.call('HMGET', depth_key(model), 'queued', 'running')
  if tonumber(counts[1] or '0') <= 0 and tonumber(counts[2] or '0') <= 0 then redis.call('DEL', depth_key(model)) end
end

-- Events: a request's log, its subscribers' reply streams, aborts to workers.

local REPLIES_LENGTH = 1000
local REPLIES_TTL_MS = 60000     -- a reply to a gateway that died must not leave a key behind for ever
local CONTROL_LENGTH = 200
local CONTROL_TTL_MS = 60000

local function make_event(kind, request_id, extra)
  local event = extra or {}
  event.type, event.request_id = kind, request_id
  return {'event', cjson.encode(event), is_progress = kind == 'accepted' or kind == 'started'}
end

local function make_failure(request_id, code, message, is_retryable)
  return make_event('failed', request_id, {error = {code = code, message = message, is_retryable = is_retryable}})
end

local function size_of(fields)
  local size = 0
  for _, field in ipairs(fields) do size = size + #field end
  return size
end

-- Live pictures are stale before anyone could come back for them: they travel on the reply streams only.
local function keeps_pictures(job)
  return job.keep_ms > 0 and job.session == ''
end

local function send_reply(gateway_id, job, seq, fields)
  local replies = replies_key(gateway_id)
  redis.call('XADD', replies, 'MAXLEN', '~', REPLIES_LENGTH, '*', 'request_id', job.id, 'seq', seq, unpack(fields))
  if redis.call('PTTL', replies) < REPLIES_TTL_MS then redis.call('PEXPIRE', replies, REPLIES_TTL_MS) end
end

-- Numbers the event, writes `logged` (nil: nothing) into the request's log and sends `fields` to every subscriber.
-- The number is the entry's id in the log, so that log and replies can't disagree. Mere progress goes to those alone who
-- follow the whole story (`attach`): a gateway that waits for a picture would be woken twice for nothing.
local function append_event(job, fields, logged)
  job.seq = redis.call('HINCRBY', job.key, 'seq', 1)
  if logged then redis.call('XADD', events_key(job.id), job.seq .. '-0', unpack(logged)) end
  local receivers = fields.is_progress and job.followers or job.subscribers
  for gateway_id in string.gmatch(receivers, '[^\n]+') do send_reply(gateway_id, job, job.seq, fields) end
end

local function drop_preview(job)
  if job.preview_seq == 0 then return end
  redis.call('XDEL', events_key(job.id), job.preview_seq .. '-0')
  set_job(job, {preview_seq = 0, preview_bytes = 0})
end

local function send_abort(worker_id, request_id, reason, ms_since_final)
  if worker_id == '' then return end
  redis.call('XADD', control_key(worker_id), 'MAXLEN', CONTROL_LENGTH, '*', 'request_id', request_id,
             'reason', reason, 'ms_since_final', ms_since_final or '')
  redis.call('PEXPIRE', control_key(worker_id), CONTROL_TTL_MS)
end

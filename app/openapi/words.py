"""What the OpenAPI document says in words: of parameters, fields and headers, and its examples."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

DESCRIPTION = """Real-time text-to-image with few-step diffusion models.

Errors have one shape everywhere, OpenAI's. `WS /v1/live`, the live protocol, is described in docs/live-protocol.md:
OpenAPI has no place for WebSockets."""
TAGS = {
    "live": "Tokens for live sockets; the live protocol itself is in docs/live-protocol.md.",
    "generations": "Draw a picture, look it up, follow it, cancel it.",
    "OpenAI": "OpenAI's images API, for its clients as they are.",
    "models": "What can be asked for, and how fast it is right now.",
    "health": "Whether the process lives, whether pictures can be drawn, and figures.",
}

# OpenAPI wants no parameter of this name, so its meaning stands in the description of the routes that read it.
ACCEPT = """

`Accept` chooses the form of the answer: `image/png`, `image/jpeg` and `image/webp` ask for the bytes of the one
picture, and win over `output_format`; `application/json` asks for JSON with base64; `*/*` or none is JSON, or the bytes
where `output_format` is given."""

PARAMETERS: dict[str, Json] = {
    "prefer": {
        "description": "`respond-async` answers 202 at once, `wait=N` after N seconds at the latest, a whole number "
        "(RFC 7240); others are ignored",
        "schema": {"type": "array", "items": {"type": "string"}},
        "example": ["respond-async"],
    },
    "traceparent": {
        "description": "W3C trace context, passed on to the worker; ignored unless it is well formed",
        "example": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    },
    "x-fewstep-deadline-ms": {
        "description": "the request ends as `expired` after so many milliseconds; the earlier of this and the body's "
        "`deadline_ms` counts",
        "example": 30_000,
    },
    "Idempotency-Key": {
        "description": "a retry with the same key and body is the same request; 1 to 255 printable ASCII characters",
        "schema": {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
    },
    "token": {"description": "of a signed link, in place of an API key"},
    "last-event-id": {
        "description": "the `id:` of the last event seen; the stream continues after it, anything else starts from the "
        "beginning",
        "example": "0",
    },
    "generation_id": {"description": "the `id` of a generation"},
    "index": {"description": "which picture, from 0"},
    "model": {"description": "an `id` of `/v1/models`"},
}

TEXT: Json = {"type": "string"}
HEADERS: dict[str, tuple[str, Json]] = {
    "X-Request-Id": ("The id of this request, in the gateway's log too.", {**TEXT, "pattern": "^[0-9a-f]{32}$"}),
    "Location": ("The path of the generation.", {**TEXT, "pattern": "^/v1/generations/"}),
    "Preference-Applied": ("What of `Prefer` was applied.", {**TEXT, "const": "respond-async"}),
    "Server-Timing": (
        "Milliseconds of `queue`, `text`, `denoise`, `decode`, `check`, `encode` and `total`; `cache`: not drawn now.",
        {**TEXT, "pattern": r"^(queue|cache);"},
    ),
    "X-Fewstep-Seed": ("The seed of the picture.", {"type": "integer", "minimum": 0}),
    "X-Fewstep-Model": ("What drew it.", TEXT),
    "X-Fewstep-Model-Revision": ("Which revision of the model drew it.", TEXT),
    "X-Fewstep-Generation": ("The id of the generation.", TEXT),
    "Cache-Status": ("Whether the picture was drawn for this request or shared (RFC 9211).", TEXT),
    "Idempotent-Replayed": ("That the key was used before: this is the same request.", {**TEXT, "const": "true"}),
    "Deprecation": ("Since when the model is deprecated (RFC 9745).", {**TEXT, "pattern": r"^@\d+$"}),
    "Sunset": ("When the model will go (RFC 8594).", TEXT),
    "Cache-Control": ("Whether the answer may be kept.", TEXT),
    "X-Accel-Buffering": ("Keeps nginx from collecting the stream.", {**TEXT, "const": "no"}),
    "X-RateLimit-Limit": ("The key's requests or images a minute, whichever is tighter.", {"type": "integer"}),
    "X-RateLimit-Remaining": ("What is left of them.", {"type": "integer"}),
    "X-RateLimit-Reset": ("Seconds until some of it comes back.", {"type": "integer"}),
    "RateLimit-Policy": ("All limits of the key, in the fields of the IETF's draft.", TEXT),
    "RateLimit": ("What is left of each, in the fields of the IETF's draft.", TEXT),
    "WWW-Authenticate": ("How to say who is asking.", {**TEXT, "const": "Bearer"}),
    "Retry-After": ("Seconds until it is worth another try.", {"type": "integer", "minimum": 1}),
    "retry-after-ms": ("The same in milliseconds.", {"type": "integer", "minimum": 1}),
    "x-should-retry": (
        "Overrides what OpenAI's clients conclude from the status.",
        {**TEXT, "enum": ["true", "false"]},
    ),
}
UNUSED = "accepted for clients that send it; changes nothing"

# Fields of requests; those of OpenAI's route first by its own words, then by these.
FIELDS: dict[str, str] = {
    "prompt": "what to draw",
    "negative_prompt": "what to avoid; has an effect only with a `guidance_scale` above 1",
    "model": "an `id` of `/v1/models`; `FEWSTEP_DEFAULT_MODEL` by default",
    "width": "of one of the model's `sizes`; its first by default",
    "height": "of one of the model's `sizes`; its first by default",
    "num_inference_steps": "within the model's limits",
    "guidance_scale": "within the model's limits",
    "seed": "0 to 9007199254740991 (2^53 − 1); the same seed gives the same picture; drawn at random by default",
    "scheduler": "one of the model's `schedulers`",
    "loras": 'some of the model\'s `loras`, as `[{"name", "weight"}]`, each once; without a weight its default',
    "num_images": "picture i is drawn from `seed` + i; 1 by default",
    "decoder": "`full`, `tiny` (faster, coarser) or `auto`, the default, which is `full` here",
    "output_format": "`png`, `jpeg` or `webp`; `jpeg` by default",
    "output_quality": "1 to 100, for `jpeg` and `webp`; 85 by default",
    "previews": "whether `/events` carries previews; `false` by default",
    "deadline_ms": "1 to 3600000, see [deadlines](#deadlines); none by default",
    "metadata": "whether the file carries its parameters (PNG text, EXIF description); `true` by default",
    "cache": "whether the result may be [shared](#shared-results), `true` by default; only with a `seed`",
}

OPENAI_FIELDS: dict[str, str] = {
    "n": "how many pictures, 1 by default; a stream has one",
    "size": "one of the model's `sizes`, or `auto`, its first, by default",
    "quality": "the number of steps: `low` half the model's default, `high` and `hd` twice, `xhigh` three times, `max` "
    "the most it allows, others the default; `num_inference_steps` wins",
    "background": "`auto` or `opaque`: the models draw opaque pictures",
    "output_format": "`png`, the default, `jpeg` or `webp`",
    "output_compression": "0 to 100, the default, for `jpeg` and `webp`",
    "complexity": UNUSED,
    "moderation": UNUSED,
    "stream": "whether the answer is a stream of events",
    "partial_images": "at most so many previews in a stream; none by default",
    "response_format": "`b64_json`, or `url`: a signed link that needs no key",
    "style": UNUSED,
    "user": "the end user",
    "safety_identifier": "the end user, sent back",
}
TOKEN_FIELDS: dict[str, str] = {
    "origin": "of the page that the token is for, as in `https://example.org`",
    "model": "the one model that it allows; the default one by default",
    "ttl_s": "how long it lives, within `FEWSTEP_LIVE_TOKEN_MAX_TTL_S`; 300 by default",
    "max_messages_per_s": "fewer than `FEWSTEP_LIVE_MAX_MESSAGES_PER_S`",
    "max_images_per_minute": "fewer than the key's",
    "user": "whom it is for: tokens of one user share its rate",
}
BODIES = {
    "GenerationRequest": FIELDS,
    "OpenAIImageRequest": FIELDS | OPENAI_FIELDS,
    "LiveTokenRequest": TOKEN_FIELDS,
}
# Of a page; IPv6 addresses, which have no short pattern, are taken too.
ORIGIN = (
    r"^https?://[A-Za-z0-9_.-]+"
    r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?/?$"
)
NOT_OFFERED = frozenset({"frame_count", "frame_duration_ms", "svg"})
# What can't stand together in a request of OpenAI's.
CONTRADICTIONS: list[Json] = [
    {"required": ["stream", "n"], "properties": {"stream": {"const": True}, "n": {"type": "integer", "minimum": 2}}},
    {
        "required": ["stream", "response_format"],
        "properties": {"stream": {"const": True}, "response_format": {"const": "url"}},
    },
    {
        "required": ["output_compression"],
        "properties": {
            "output_compression": {"type": "integer", "maximum": 99},
            "output_format": {"enum": ["png", None]},
        },
    },
]
API_KEY: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key. Where the service has none, or lets everyone in, the header may be left out.",
}

APPLE = "a red apple on a blue background"
EXAMPLES: dict[str, Json] = {
    "create_generation": {
        "shortest": {"summary": "The model's defaults", "value": {"prompt": APPLE}},
        "everything": {
            "summary": "Every choice made",
            "value": {
                "prompt": APPLE,
                "negative_prompt": "text",
                "num_inference_steps": 2,
                "guidance_scale": 1.5,
                "seed": 7,
                "num_images": 4,
                "decoder": "full",
                "output_format": "webp",
                "output_quality": 90,
                "previews": True,
                "deadline_ms": 30_000,
                "metadata": False,
            },
        },
    },
    "create_image": {
        "shortest": {"summary": "As OpenAI's clients ask", "value": {"prompt": APPLE, "n": 1, "size": "auto"}},
        "stream": {
            "summary": "Previews on the way",
            "value": {"prompt": APPLE, "stream": True, "partial_images": 2, "seed": 7},
        },
    },
}

"""What a gateway asks: which worker takes a request that the gateway itself then carries there.

Speaks the Gateway API Inference Extension's endpoint picker protocol (version 1.0.0), which is
Envoy's external processing. `server` listens, `session` holds one request's conversation,
`placement` decides with the same policy and picker as the HTTP path, `carried` reads the answer as
it goes by, `replies` and `messages` are the words. Nothing here is imported unless the
configuration names a `gateway_port`.
"""

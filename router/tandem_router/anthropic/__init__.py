"""Anthropic's Messages API over the chat requests that every tier answers.

Coding agents speak it. Only the envelope differs from chat completions, so routing, failover,
budgets and the cache apply as they are.
"""

"""Scorers: functions from (prompts, responses) to one reward each."""

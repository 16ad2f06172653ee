"""Advice: settings that work and cost more than they need to, named once on rank 0 with the numbers.

A report beside the run: nothing here changes a setting, and no step waits for it.
"""

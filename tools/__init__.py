"""Commands besides the stages: benchmark, teacher, data check, merging of adapters."""

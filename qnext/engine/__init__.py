"""Generation: LLM (llm.py) in front, the step loop (generate.py), sampling and speculation behind.

A request's way: llm.py -> prompts.py, validation.py -> generate.py (who runs) -> runner.py (the
forward, sampler.py, speculative.py) -> request.py (tokens, stops) -> outputs.py.
"""

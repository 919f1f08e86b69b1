"""Quantised weights as surgery on a built module tree.

A room beside the layers, which know nothing of it: ``config`` reads ``quantization_config``,
``names`` decides which modules it means, each format (``fp8``, ``int4``, ``gptq``, ``awq``) says
which disk tensors a matrix has, ``matrix`` holds the packed bytes, ``modules`` computes with them
and ``surgery`` exchanges modules before any memory is filled.
"""

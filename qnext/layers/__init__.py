"""The model's parts as ``nn.Module``; they know sequences, not ranks, files or adapters.

Read in this order: ``packed``, ``state``, ``norm``, ``rotary``, ``attention``, ``delta_net``,
``mlp``, ``moe``, ``decoder``, ``mtp``, ``model``.
"""

"""The forward pass as one program, compiled when the engine starts.

    team (threads) -> forward (the list of phases) -> rows, product, attention -> vector (IR)

numba compiles it, nothing is cached on disk. What numba cannot say (sixteen numbers at once,
atomic counters) is written in LLVM's own terms in ``vector``, ``product`` and ``attention``.
"""

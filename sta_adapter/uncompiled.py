"""`uncompiled`: what `torch.compiler.disable` does, without importing torch's compiler (seconds) before the first call."""

from torch._compile import _disable_dynamo

uncompiled = _disable_dynamo

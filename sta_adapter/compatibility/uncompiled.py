"""`uncompiled`: what `torch.compiler.disable` does, without importing torch's compiler (seconds) before the first call."""

from sta_adapter.compatibility.seams import disable_dynamo

uncompiled = disable_dynamo()

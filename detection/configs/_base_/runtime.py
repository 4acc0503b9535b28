# What every detector here shares: registrations, checkpoints, logs.
_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(
    imports=["detection.backbones", "detection.hooks", "detection.optimizers"], allow_failed_imports=False
)
default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=1, max_keep_ckpts=3))

# Faster R-CNN with FPN of mmdetection; the backbone comes with the config.
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

model = dict(
    type="FittedFasterRCNN",
    backbone=dict(_delete_=True, type="ClassificationBackbone"),
    neck=dict(_delete_=True, type="FPN", out_channels=256, num_outs=5),
)

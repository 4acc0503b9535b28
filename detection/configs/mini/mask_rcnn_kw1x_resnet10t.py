# A small Mask R-CNN on ResNet10-t with KernelWarehouse (1x), from random weights, on the data set of
# scripts/make_mini_coco.py: minutes on two CPU cores.  Parameters: 5.78 M.
#   python scripts/make_mini_coco.py --output mini_coco
#   python detection/train.py detection/configs/mini/mask_rcnn_kw1x_resnet10t.py
_base_ = ["../_base_/runtime.py", "../_base_/mask_rcnn.py"]

classes = tuple("0123456789")
data_root = "mini_coco/"

_strides = [4, 8, 16, 32]


def _roi(size):
    layer = dict(type="RoIAlign", output_size=size, sampling_ratio=2)
    return dict(roi_layer=layer, out_channels=64, featmap_strides=_strides, finest_scale=28)


model = dict(
    data_preprocessor=dict(mean=[90.0, 90.0, 90.0], std=[60.0, 60.0, 60.0]),
    backbone=dict(config="kw_resnet10t"),
    neck=dict(out_channels=64, num_outs=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[5], strides=_strides)),
    roi_head=dict(
        bbox_roi_extractor=_roi(7),
        bbox_head=dict(in_channels=64, fc_out_channels=128, num_classes=10),
        mask_roi_extractor=_roi(7),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=400, max_per_img=200),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5), mask_size=14),
    ),
    test_cfg=dict(rpn=dict(nms_pre=400, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
_data = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=classes))
_loader = dict(batch_size=8, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    **_loader,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **_data,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    **_loader,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **_data,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=max_epochs, eta_min=1e-6, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)

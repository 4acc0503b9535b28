# ODConv's recipe (section 4.2 and its appendix) on COCO 2017, mmdetection's own 1x schedule: 12 epochs, SGD 0.02 at
# batch 16 = 8 processes x 2 images, momentum 0.9, weight decay 1e-4, one scale of 1333 x 800.
_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "./runtime.py"]

"""Parameters of every network as somebody else published them, and multiply-adds where torchvision does not say."""

TORCHVISION = "torchvision's documentation, num_params"
OPS = "torchvision's documentation, _ops"
SEMERY = "O. Semery's model table, github.com/osmr/imgclsmob"
RESNET = "He et al. 2015, section 4.2 multiplied out; table 6 rounds it to"

DEEPLAR = "a table of an independent port of the authors' weights rounds it to"

# The head that FCN and DeepLabV3 have for training: 3x3 from 1024 to 256 channels, normalised, and 1x1 to 21 classes.
AUXILIARY = 9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21
# FCN-8s beside VGG-16 with 21 classes: a 1x1 on pool4 and one on pool3, and the three that upsample, 4, 4 and 16 wide.
SKIPS = (512 + 1) * 21 + (256 + 1) * 21 + (2 * 4 * 4 + 16 * 16) * 21 * 21
# ResNets without their classifiers.
TRUNK_50, TRUNK_101 = 25_557_032 - 2049 * 1000, 44_549_160 - 2049 * 1000
# PSPNet's four branches of 512 channels, and 3x3 from 4096 to 512 channels and 1x1 to 21 classes.
PYRAMID = 4 * (2048 * 512 + 2 * 512) + 9 * 4096 * 512 + 2 * 512 + 512 * 21 + 21
# VGG-16 with 21 classes for 1000, and the basic context module: seven 3x3 layers of 21 channels and a 1x1.
VGG16_21 = 138_357_544 - (4096 + 1) * (1000 - 21)
CONTEXT = 7 * (9 * 21 + 1) * 21 + (21 + 1) * 21
# Scale and shift of the trunk's batch normalisation, which torchvision's detectors freeze and so do not count.
NORMALIZATION_50, NORMALIZATION_MOBILE = 53_120, 24_400
FROZEN = TORCHVISION + ", and the trunk's normalisation, which is frozen there"

# name: (parameters, who says so)
PARAMETERS = {
    "alexnet": (61_100_840, TORCHVISION),
    "alexnet-2012": (60_965_224, "HewlettPackard/dlcookbook-dlbs, models table; the paper says 60 million"),
    "bninception": (11_295_240, SEMERY),
    "deeplabv3_resnet101": (60_996_202 - AUXILIARY, TORCHVISION + ", without the auxiliary head"),
    "deeplabv3_resnet50": (42_004_074 - AUXILIARY, TORCHVISION + ", without the auxiliary head"),
    "densenet121": (7_978_856, TORCHVISION),
    "densenet161": (28_681_000, TORCHVISION),
    "densenet169": (14_149_480, TORCHVISION),
    "densenet201": (20_013_928, TORCHVISION),
    "dilated_vgg16": (VGG16_21, "Yu, Koltun 2016, section 4: VGG-16's layers, as convolutions"),
    "dilated_vgg16_context": (VGG16_21 + CONTEXT, "Yu, Koltun 2016, Table 1 multiplied out, with biases"),
    "drn_c_26": (21_126_584, DEEPLAR + " 21.127 million"),
    "drn_c_42": (31_234_744, DEEPLAR + " 31.235 million"),
    "drn_c_58": (40_542_008, DEEPLAR + " 40.542 million"),
    "drn_d_105": (54_801_304, "recorded from our own definition, not checked against a published figure"),
    "drn_d_22": (16_393_752, DEEPLAR + " 16.394 million"),
    "drn_d_38": (26_501_912, DEEPLAR + " 26.502 million"),
    "drn_d_54": (35_809_176, DEEPLAR + " 35.809 million"),
    "efficientnet_b0": (5_288_548, TORCHVISION),
    "efficientnet_b1": (7_794_184, TORCHVISION),
    "efficientnet_b2": (9_109_994, TORCHVISION),
    "efficientnet_b3": (12_233_232, TORCHVISION),
    "efficientnet_b4": (19_341_616, TORCHVISION),
    "efficientnet_b5": (30_389_784, TORCHVISION),
    "efficientnet_b6": (43_040_704, TORCHVISION),
    "efficientnet_b7": (66_347_960, TORCHVISION),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (19_386_354 + NORMALIZATION_MOBILE, FROZEN),
    "fasterrcnn_mobilenet_v3_large_fpn": (19_386_354 + NORMALIZATION_MOBILE, FROZEN),
    "fasterrcnn_resnet101_c4": (
        TRUNK_101 + (9 * 1024 + 1) * 512 + (512 + 1) * 12 * (1 + 4) + (2048 + 1) * 91 * (1 + 4),
        "He et al. 2015, appendix A multiplied out: conv1 to conv5, proposals of 12 anchors on conv4, 91 classes",
    ),
    "fasterrcnn_resnet101_fpn": (
        41_755_286 + NORMALIZATION_50 + 44_549_160 - 25_557_032,
        TORCHVISION + ": the detector with ResNet-50, its normalisation, and the difference of the trunks",
    ),
    "fasterrcnn_resnet50_fpn": (41_755_286 + NORMALIZATION_50, FROZEN),
    "fasterrcnn_resnet50_fpn_v2": (43_712_278, TORCHVISION),
    "fcn8s_vgg16": (VGG16_21 + SKIPS, "Long et al. 2015, section 4 multiplied out; Table 1 rounds it to 134M"),
    "fcn_resnet101": (54_314_346 - AUXILIARY, TORCHVISION + ", without the auxiliary head"),
    "fcn_resnet50": (35_322_218 - AUXILIARY, TORCHVISION + ", without the auxiliary head"),
    "fcos_resnet50_fpn": (32_269_600 + NORMALIZATION_50, FROZEN),
    "googlenet": (6_624_904, TORCHVISION),
    "googlenet-2014": (6_998_552, "BVLC's bvlc_googlenet.caffemodel, 13,378,280 with its auxiliary classifiers"),
    "hdc_resnet101": (
        TRUNK_101 + 4 * (9 * 2048 + 1) * 21 * 16,
        "Wang et al. 2018, sections 3.1 and 4.1 multiplied out, on torchvision's trunk",
    ),
    "inception_resnet_v2": (55_843_464, SEMERY),
    "inception_v3": (23_834_568, SEMERY),
    "inception_v4": (42_679_816, SEMERY),
    "lenet5": (60_000, "LeCun et al. 1998, section II.B"),
    "lenet5-softmax": (60_850, "LeCun et al. 1998, section II.B, and a linear layer of 84 x 10 + 10"),
    "lraspp_mobilenet_v3_large": (3_221_538, TORCHVISION),
    "mnasnet0_5": (2_218_512, TORCHVISION),
    "mnasnet0_75": (3_170_208, TORCHVISION),
    "mnasnet1_0": (4_383_312, TORCHVISION),
    "mnasnet1_3": (6_282_256, TORCHVISION),
    "mobilenet_v2": (3_504_872, TORCHVISION),
    "mobilenet_v3_large": (5_483_032, TORCHVISION),
    "mobilenet_v3_small": (2_542_856, TORCHVISION),
    "mobilenetv1_100": (4_231_976, SEMERY),
    "nin": (7_595_176, "the authors' Caffe model multiplied out; its file of float32 has 29 MB"),
    "nin-cifar": (966_986, SEMERY),
    "pspnet_resnet50": (TRUNK_50 + PYRAMID, "Zhao et al. 2017, section 3.2 multiplied out, on torchvision's trunk"),
    "resnet101": (44_549_160, TORCHVISION),
    "resnet110": (1_727_962, f"{RESNET} 1.7M"),
    "resnet1202": (19_421_274, f"{RESNET} 19.4M"),
    "resnet152": (60_192_808, TORCHVISION),
    "resnet18": (11_689_512, TORCHVISION),
    "resnet20": (269_722, f"{RESNET} 0.27M"),
    "resnet32": (464_154, f"{RESNET} 0.46M"),
    "resnet34": (21_797_672, TORCHVISION),
    "resnet44": (658_586, f"{RESNET} 0.66M"),
    "resnet50": (25_557_032, TORCHVISION),
    "resnet56": (853_018, f"{RESNET} 0.85M"),
    "resnext101_32x8d": (88_791_336, TORCHVISION),
    "resnext101_64x4d": (83_455_272, TORCHVISION),
    "resnext50_32x4d": (25_028_904, TORCHVISION),
    "retinanet_resnet50_fpn": (34_014_999 + NORMALIZATION_50, FROZEN),
    "retinanet_resnet50_fpn_v2": (38_198_935, TORCHVISION),
    "shufflenet_v2_x0_5": (1_366_792, TORCHVISION),
    "shufflenet_v2_x1_0": (2_278_604, TORCHVISION),
    "shufflenet_v2_x1_5": (3_503_624, TORCHVISION),
    "shufflenet_v2_x2_0": (7_393_996, TORCHVISION),
    "squeezenet1_0": (1_248_424, TORCHVISION),
    "squeezenet1_1": (1_235_496, TORCHVISION),
    "ssd300_vgg16": (35_641_826, TORCHVISION),
    "ssdlite320_mobilenet_v3_large": (3_440_060, TORCHVISION),
    "unet": (31_030_658, "Ronneberger et al. 2015, Fig. 1 multiplied out, with biases"),
    "vgg11": (132_863_336, TORCHVISION),
    "vgg11-lrn": (132_863_336, "Simonyan, Zisserman 2014, table 2: as many as A"),
    "vgg11_bn": (132_868_840, TORCHVISION),
    "vgg13": (133_047_848, TORCHVISION),
    "vgg13_bn": (133_053_736, TORCHVISION),
    "vgg16": (138_357_544, TORCHVISION),
    "vgg16-c": (133_638_952, "Simonyan, Zisserman 2014, table 1 multiplied out; table 2 rounds it to 134 million"),
    "vgg16-cifar": (14_728_266, "the model tables of many CIFAR-10 repositories"),
    "vgg16_bn": (138_365_992, TORCHVISION),
    "vgg19": (143_667_240, TORCHVISION),
    "vgg19_bn": (143_678_248, TORCHVISION),
    "wide_resnet101_2": (126_886_696, TORCHVISION),
    "wide_resnet50_2": (68_883_240, TORCHVISION),
    "xception": (22_855_952, SEMERY),
    "zfnet": (62_357_608, "Zeiler, Fergus 2014, Fig. 3 multiplied out, with biases"),
}

# name: (multiply-adds of one image, who says so); Semery's count normalisation and activations too, about 1 %
MULTIPLY_ADDS = {
    "alexnet-2012": (724_406_816, "the paper's Fig. 2 multiplied out"),
    "bninception": (2_048_060_000, SEMERY),
    "fasterrcnn_resnet50_fpn": (134_380_000_000, OPS),
    "fasterrcnn_resnet50_fpn_v2": (280_371_000_000, OPS),
    "fcos_resnet50_fpn": (128_207_000_000, OPS),
    "googlenet-2014": (1_586_000_000, "Table 1's column of ops, with 118 million for the 34 of its first layer"),
    "inception_resnet_v2": (13_188_640_000, SEMERY),
    "inception_v4": (12_304_930_000, SEMERY),
    "lraspp_mobilenet_v3_large": (2_086_000_000, OPS),
    "mobilenetv1_100": (569_000_000, "Howard et al. 2017, table 6"),
    "nin-cifar": (222_970_000, SEMERY),
    "retinanet_resnet50_fpn": (151_540_000_000, OPS),
    "retinanet_resnet50_fpn_v2": (152_238_000_000, OPS),
    "ssd300_vgg16": (34_858_000_000, OPS),
    "ssdlite320_mobilenet_v3_large": (583_000_000, OPS),
    "vgg11-lrn": (7_609_090_048, "as vgg11"),
    "xception": (8_403_630_000, SEMERY),
    "zfnet": (1_168_032_896, "the paper's Fig. 3 multiplied out"),
}

"""One small model of each family of timm, and the side of the images that it is tried with."""

from __future__ import annotations

from typing import Final

USUAL_SIDE: Final = 128
_TABLE: Final = """
beit beit_base_patch16_224
byoanet halonet_h1 256
byobnet repvgg_b0
cait cait_xxs24_224
coat coat_lite_tiny
convit convit_tiny
convmixer convmixer_768_32
convnext convnext_atto
crossvit crossvit_9_240 240
cspnet cs3darknet_s
davit davit_tiny 224
deit deit_tiny_patch16_224
densenet densenet121
dla dla46_c
dpn dpn48b
edgenext edgenext_xx_small
efficientformer efficientformer_l1 224
efficientformer_v2 efficientformerv2_s0 224
efficientnet efficientnet_b0
efficientvit_mit efficientvit_b0
efficientvit_msra efficientvit_m0 224
eva eva02_tiny_patch14_224 112
fasternet fasternet_t0
fastvit fastvit_t8
focalnet focalnet_tiny_srf
gcvit gcvit_xxtiny 224
ghostnet ghostnet_050
hardcorenas hardcorenas_a
hgnet hgnetv2_b0
hiera hiera_tiny_224 224
hrnet hrnet_w18_small
inception_next inception_next_atto
inception_v3 inception_v3
inception_v4 inception_v4
levit levit_128s 224
mambaout mambaout_femto
maxxvit maxvit_pico_rw_256 256
metaformer poolformer_s12
mlp_mixer mixer_s32_224
mobilenetv3 mobilenetv3_small_050
mobilevit mobilevit_xxs
mvitv2 mvitv2_tiny 224
nest nest_tiny 224
nextvit nextvit_small
nfnet nf_regnet_b0
pit pit_ti_224
pvt_v2 pvt_v2_b0
rdnet rdnet_tiny
regnet regnety_002
repghost repghostnet_050
repvit repvit_m0_9
res2net res2net50_26w_4s
resnest resnest14d
resnet resnet18
resnetv2 resnetv2_18
rexnet rexnet_100
selecsls selecsls42
senet legacy_seresnet18
sequencer sequencer2d_s
shvit shvit_s1
sknet skresnet18
starnet starnet_s050
swiftformer swiftformer_xs
swin_transformer swin_tiny_patch4_window7_224 224
swin_transformer_v2 swinv2_cr_tiny_224 224
tiny_vit tiny_vit_5m_224 224
tnt tnt_s_patch16_224
tresnet tresnet_m
twins twins_svt_small
vgg vgg11
visformer visformer_tiny 224
vision_transformer vit_tiny_patch16_224
vision_transformer_dino vit_small_patch14_dinov2 112
vision_transformer_hybrid vit_tiny_r_s16_p8_224
vision_transformer_relpos vit_relpos_small_patch16_224
volo volo_d1_224 224
vovnet ese_vovnet19b_slim
xception xception41
xcit xcit_nano_12_p16_224
"""


def _parse(line: str) -> tuple[str, tuple[str, int]]:
    family, model, *side = line.split()
    return family, (model, int(side[0]) if side else USUAL_SIDE)


FAMILIES: Final = dict(map(_parse, _TABLE.strip().splitlines()))
"""Family -> model and side; a family is a module of `timm.models`."""

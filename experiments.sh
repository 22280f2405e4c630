#!/usr/bin/env bash
# The command of every row of RESULTS.md, plainly. What is finished is skipped, what was stopped continues.
#     bash experiments.sh ROW PAIR [SEED [key=value ...]]     PAIR: streets, day_dusk, carla or idd; seed 0 by default
# ROW is one of
#     main                          the five variants
#     long                          three times the steps
#     seen                          Source Only, until it has seen as many images as TGCF-DA + SE: three times the steps
#     vgg16                         the five variants with the paper's own trunk, on the main row's images
#     reinhard, fda, jitter         the controls: images by a translator that is not trained
#     more                          as many steps again, from the seed's Source Only student
#     labels                        4, 16 and 64 labelled target images (all: day_dusk 62, streets 500)
#     cyclegan, cut, fastcut, mcd, dcan     the methods of baselines/, alone and with self-ensembling
#     dcan_images                   the images of the row dcan without its aligned features
#     KEY=VALUE                     an ablation: of gan and fseg it makes images anew; others use the main row's
#     judge                         labels and styles kept by the images of the rows above, by an f_seg of seed 100
# and     bash experiments.sh table PAIR      the table of all that has run
# Real data below data/ (README, "Published data sets"). On a CPU, OMP_NUM_THREADS=1 and two rows at a time get
# most done.
set -eu
cd "$(dirname "$0")"
[ $# -ge 2 ] || { sed -n '2,18p' "$0"; exit 2; }
ROW=$1 PAIR=$2 SEED=${3:-0} KEYS="seed=${3:-0} ${*:4}"

SPLITS=val FEW="4 16 64" LONG=1800
case $PAIR in
  streets) CFG=cfg.yaml LONG=480 FEW="4 16 64 500" ;;
  day_dusk) CFG=configs/camvid_day_dusk.yaml FEW="4 16 62" ;;
  carla) CFG=configs/carla_camvid.yaml SPLITS="val test val+test" ;;
  idd) CFG=configs/idd_camvid.yaml SPLITS="val test val+test" ;;
  *) echo "no such pair: $PAIR" >&2; exit 2 ;;
esac
MAIN=runs/$PAIR-$SEED
IMAGES=$MAIN/augmented                # those of the main row, in one style or several
[ -d $IMAGES/style1 ] && [ $ROW != augment.styles_per_image=1 ] || IMAGES=$IMAGES/style0
IMAGES="augment.method=folder augment.folder=$IMAGES"

learn() {  # "variants" key=value ...
  local variants=$1
  shift
  for V in $variants; do
    python train_selfens.py $CFG $KEYS "$@" selfens.variant=$V
    for SPLIT in $SPLITS; do python evaluate.py $CFG $KEYS "$@" selfens.variant=$V --split $SPLIT; done
  done
}

paint() {  # key=value ...
  case "$*" in *augment.method*) ;; *) python train_gan.py $CFG $KEYS "$@" ;; esac
  python augment.py $CFG $KEYS "$@"
}

case $ROW in
  main)
    paint name=$PAIR-$SEED
    learn "source_only self_ensembling tgcf_da tgcf_da_se target_only" name=$PAIR-$SEED ;;
  long)
    paint name=${PAIR}_long-$SEED $IMAGES
    learn "source_only self_ensembling tgcf_da tgcf_da_se target_only" name=${PAIR}_long-$SEED selfens.steps=$LONG $IMAGES ;;
  seen)
    learn source_only name=${PAIR}_seen-$SEED selfens.steps=$LONG ;;
  vgg16)                              # where torchvision cannot download it: selfens.pretrained=FILE
    paint name=${PAIR}_vgg16-$SEED $IMAGES
    learn "source_only self_ensembling tgcf_da tgcf_da_se target_only" name=${PAIR}_vgg16-$SEED selfens.trunk=vgg16 $IMAGES ;;
  reinhard | fda | jitter)
    paint name=${PAIR}_$ROW-$SEED augment.method=$ROW
    learn "tgcf_da tgcf_da_se" name=${PAIR}_$ROW-$SEED augment.method=$ROW ;;
  more)
    FROM="name=${PAIR}_more-$SEED selfens.pretrained=$MAIN/selfens/source_only/last.pt $IMAGES"
    paint $FROM
    learn "source_only self_ensembling tgcf_da tgcf_da_se" $FROM ;;
  labels)
    for N in $FEW; do
      paint name=${PAIR}_labels$N-$SEED $IMAGES
      learn "source_only tgcf_da" name=${PAIR}_labels$N-$SEED $IMAGES target.labelled=$N
    done ;;
  cyclegan | cut | fastcut | dcan_images)
    [ $ROW != fastcut ] && FAST= || FAST=--fast
    [ $ROW = dcan_images ] || python baselines/${ROW/fastcut/cut}.py $CFG name=$PAIR-$SEED $KEYS $FAST
    IMAGES="augment.method=folder augment.folder=$MAIN/baselines/${ROW%_images}/images augment.styles_per_image=1"
    paint name=${PAIR}_$ROW-$SEED $IMAGES
    learn "tgcf_da tgcf_da_se" name=${PAIR}_$ROW-$SEED $IMAGES ;;
  mcd | dcan)
    for SE in "" --se; do
      python baselines/$ROW.py $CFG name=$PAIR-$SEED $KEYS $SE
      FILE=$MAIN/baselines/$ROW${SE:+_se}/last.pt
      for SPLIT in $SPLITS; do python evaluate.py $CFG name=$PAIR-$SEED $KEYS --checkpoint $FILE --split $SPLIT; done
    done ;;
  judge)
    python train_gan.py $CFG name=$PAIR-judge seed=100 gan.steps=0
    for RUN in runs/$PAIR-$SEED runs/${PAIR}_{reinhard,fda,jitter,cyclegan,cut,fastcut,dcan_images,gan.*}-$SEED; do
      [ ! -f $RUN/augmented/identity.json ] ||
        python augment.py $RUN/augmented/config.yaml --judge runs/$PAIR-judge/gan/fseg/last.pt
    done ;;
  table) python evaluate.py --table runs/$PAIR*-[0-9]* ;;
  gan.*=* | fseg.*=*)
    paint name=${PAIR}_${ROW/=/_}-$SEED $ROW
    learn "tgcf_da tgcf_da_se" name=${PAIR}_${ROW/=/_}-$SEED $ROW ;;
  *=*)
    paint name=${PAIR}_${ROW/=/_}-$SEED $IMAGES $ROW
    learn tgcf_da_se name=${PAIR}_${ROW/=/_}-$SEED $IMAGES $ROW ;;
  *) echo "no such row: $ROW" >&2; exit 2 ;;
esac

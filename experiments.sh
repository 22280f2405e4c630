#!/usr/bin/env bash
# The command of every row of RESULTS.md, plainly. What is finished is skipped, what was stopped continues.
#     bash experiments.sh PAIR [SEED]     streets, day_dusk, carla or idd: the five variants, seed 0 by default
#     bash experiments.sh table PAIR      the table of all seeds that have run
#     bash experiments.sh judge PAIR      labels kept on repainted images, by an f_seg of seed 100
# Real data below data/ (README, "Published data sets"). On a CPU, OMP_NUM_THREADS=1 and two rows at a time get
# most done.
set -eu
cd "$(dirname "$0")"

config() {
  case $1 in
    streets) echo cfg.yaml ;;
    day_dusk) echo configs/camvid_day_dusk.yaml ;;
    carla) echo configs/carla_camvid.yaml ;;
    idd) echo configs/idd_camvid.yaml ;;
    *) echo "no such pair: $1" >&2; exit 2 ;;
  esac
}

variants() {  # what has to be there before it, then the variant
  local run="$(config "$1") name=$1-$2 seed=$2"
  python train_gan.py $run
  python augment.py $run
  for V in source_only self_ensembling tgcf_da tgcf_da_se target_only; do
    python train_selfens.py $run selfens.variant=$V
    python evaluate.py $run selfens.variant=$V
  done
}

case ${1:-help} in
  help) sed -n '2,7p' "$0" ;;
  table) python evaluate.py --table runs/"$2"-[0-9]* ;;
  judge)
    python train_gan.py $(config "$2") name="$2"-judge seed=100 gan.steps=0
    python augment.py $(config "$2") name="$2"-0 --judge runs/"$2"-judge/gan/fseg/last.pt ;;
  *) variants "$1" "${2:-0}" ;;
esac

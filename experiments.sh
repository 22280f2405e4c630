#!/bin/bash
# Every row of RESULTS.md by its command. What is finished is skipped and what was stopped goes on, so the same line may be
# given again after any interruption. CARLA, CamVid and IDD-Lite lie below data/ (README, "Data").
#
#   bash experiments.sh list                    the rows, and the config and keys of each
#   bash experiments.sh all                     all rows, one after the other
#   bash experiments.sh idd-0 'idd-ema-*'       some rows, by their names or patterns of them
#   bash experiments.sh table                   the tables, of what is finished
#   bash experiments.sh figures                 the figures, of what is finished
#
# Two may run side by side: a stage that another process has in hand is left to it. On 2 cores that, with OMP_NUM_THREADS=1,
# is the fastest. Minutes of each stage are kept in runs/minutes.tsv.
set -u
cd "$(dirname "$0")" || exit
idd=configs/idd_camvid.yaml carla=configs/carla_camvid.yaml
balanced="fseg.sup_balance=0.5 fseg.rare=0.05 gan.lambda_rec=5 selfens.pretrained=fseg selfens.sup_balance=0.5 selfens.con_balance=0.5 selfens.rare=0.05"
trunk="configs/carla_camvid_plus.yaml selfens.pretrained=fseg"
five="source_only self_ensembling tgcf_da tgcf_da_se target_only"

# run folder (NAME-SEED) | variants | config and keys | run whose generator is taken (gan) or whose images too (images)
rows() {
  local S
  for S in 0 1 2; do echo "streets-$S|$five|cfg.yaml selfens.snapshot_every=50 sheet_every=150"; done
  for S in 0 1 2; do echo "idd-$S|$five|$idd selfens.snapshot_every=100 sheet_every=200"; done
  for S in 0 1 2; do echo "carla-$S|$five|$carla"; done
  for S in 0 1 2; do echo "idd-plus-$S|$five|configs/idd_camvid_plus.yaml selfens.snapshot_every=100 sheet_every=200"; done
  for S in 0 1 2; do echo "carla-plus-$S|$five|configs/carla_camvid_plus.yaml"; done
  # three times as many student updates, and f_seg's as well
  echo "idd-long-0|$five|$idd selfens.steps=3000|images idd-0"
  echo "idd-long-fseg-0|tgcf_da tgcf_da_se|$idd selfens.steps=3000 fseg.steps=2400"
  # four times as many steps of the GAN
  echo "idd-long-gan-0|tgcf_da tgcf_da_se|$idd gan.steps=6000 gan.warmup_steps=1500 fseg.checkpoint=runs/idd-0/gan/fseg/last.pt"
  # other translators
  for method in reinhard fda; do
    for S in 0 1 2; do echo "idd-$method-$S|tgcf_da tgcf_da_se|$idd augment.method=$method"; done
    for S in 0 1 2; do echo "streets-$method-$S|tgcf_da tgcf_da_se|cfg.yaml augment.method=$method"; done
  done
  # a tool that is not ours: scikit-image, which requirements.txt does not have
  echo "idd-folder-0|tgcf_da tgcf_da_se|$idd augment.method=folder augment.folder=runs/idd-folder-0/translated"
  # what batch norm's statistics do
  echo "idd-statistics-target-0|source_only|$idd selfens.statistics=target"
  echo "idd-statistics-all-0|self_ensembling|$idd selfens.statistics=all"
  echo "carla-statistics-target-0|source_only|$carla selfens.statistics=target"
  for S in 0 1 2; do
    echo "carla-labelled-$S|self_ensembling tgcf_da_se|$carla selfens.statistics=labelled|images carla-$S"
    echo "carla-plus-labelled-$S|tgcf_da_se|configs/carla_camvid_plus.yaml selfens.statistics=labelled|images carla-plus-$S"
  done
  echo "idd-no-batch-norm-0|source_only self_ensembling|$idd selfens.batch_norm=false"
  # one by one what idd_camvid_plus.yaml adds, and what was tried beside it
  echo "idd-add-sup-balance-0|source_only tgcf_da_se|$idd selfens.sup_balance=0.5|images idd-0"
  echo "idd-add-rare-0|source_only tgcf_da_se|$idd selfens.rare=0.05|images idd-0"
  echo "idd-add-trunk-0|source_only tgcf_da_se|$idd selfens.pretrained=fseg|images idd-0"
  echo "idd-add-jitter-0|source_only tgcf_da_se|$idd selfens.jitter=0.5|images idd-0"
  echo "idd-add-con-balance-0|tgcf_da_se|$idd selfens.con_balance=0.5|images idd-0"
  echo "idd-add-con-confidence-0|tgcf_da_se|$idd selfens.con_confidence=0.9|images idd-0"
  echo "idd-add-content-0|source_only tgcf_da_se|$idd selfens.content=0.3|images idd-0"
  echo "idd-add-repaint-0|tgcf_da_se|$idd selfens.repaint=true|images idd-0"
  echo "carla-fseg-no-jitter-0|tgcf_da tgcf_da_se|$carla fseg.jitter=0"
  echo "carla-no-batch-norm-0|source_only tgcf_da_se target_only|$carla selfens.batch_norm=false|images carla-0"
  echo "carla-jitter-0|source_only tgcf_da_se|$carla selfens.jitter=1 selfens.pretrained=fseg|images carla-0"
  echo "carla-jitter-labelled-0|tgcf_da_se|$carla selfens.jitter=1 selfens.pretrained=fseg selfens.statistics=labelled|images carla-0"
  echo "carla-zoom-0|source_only|$carla source.size=[216,288] selfens.crop=[144,192]"
  # what idd_camvid_plus.yaml adds, on CARLA
  echo "carla-balanced-0|source_only tgcf_da tgcf_da_se target_only|$carla $balanced"
  echo "carla-balanced-labelled-0|tgcf_da_se|$carla $balanced selfens.statistics=labelled|images carla-balanced-0"
  echo "carla-content-0|source_only tgcf_da_se|$carla selfens.content=0.1|images carla-0"
  # on top of carla_camvid_plus.yaml: f_seg's trunk, and batch norm's statistics from labelled images
  for S in 0 1 2; do
    echo "carla-plus-trunk-$S|$five|$trunk|images carla-plus-$S"
    echo "carla-plus-trunk-labelled-$S|self_ensembling tgcf_da_se|$trunk selfens.statistics=labelled|images carla-plus-$S"
    echo "carla-plus-trunk-labelled-confidence-$S|self_ensembling tgcf_da_se|$trunk selfens.statistics=labelled selfens.con_confidence=0.9|images carla-plus-$S"
  done
  echo "carla-plus-trunk-labelled-balance-0|tgcf_da_se|$trunk selfens.statistics=labelled selfens.con_balance=0.5|images carla-plus-0"
  echo "carla-plus-trunk-labelled-jitter-0|tgcf_da tgcf_da_se|$trunk selfens.statistics=labelled selfens.jitter=0.3|images carla-plus-0"
  echo "carla-plus-trunk-long-0|source_only tgcf_da|$trunk selfens.steps=3000|images carla-plus-0"
  echo "carla-plus-trunk-labelled-long-0|tgcf_da_se|$trunk selfens.statistics=labelled selfens.steps=3000|images carla-plus-0"
  echo "idd-add-rec-0|tgcf_da_se|$idd gan.lambda_rec=5 fseg.checkpoint=runs/idd-0/gan/fseg/last.pt"
  echo "idd-add-style-0|tgcf_da_se|$idd gan.lambda_style=5 fseg.checkpoint=runs/idd-0/gan/fseg/last.pt"
  # ablations
  for v in 0 1 10 30; do echo "idd-lambda-sem-$v-0|tgcf_da tgcf_da_se|$idd gan.lambda_sem=$v fseg.checkpoint=runs/idd-0/gan/fseg/last.pt"; done
  for v in 0 1 10 30; do echo "idd-delta-con-$v-0|tgcf_da_se|$idd selfens.delta_con=$v|images idd-0"; done
  echo "idd-se-delta-con-0-0|self_ensembling|$idd selfens.delta_con=0"
  for v in 0.9 0.999; do echo "idd-ema-$v-0|tgcf_da_se|$idd selfens.ema_decay=$v|images idd-0"; done
  echo "idd-no-noise-0|tgcf_da_se|$idd selfens.noise_std=0|images idd-0"
  echo "idd-no-dropout-0|tgcf_da_se|$idd selfens.dropout=0|images idd-0"
  echo "idd-fseg-no-jitter-0|tgcf_da_se|$idd fseg.jitter=0"
  echo "idd-no-spectral-norm-0|tgcf_da_se|$idd gan.spectral_norm=false fseg.checkpoint=runs/idd-0/gan/fseg/last.pt"
  for v in 1 4; do echo "idd-styles-$v-0|tgcf_da_se|$idd augment.styles_per_image=$v|gan idd-0"; done
  # the main ones on the other pairs
  for v in 0 1 10 30; do echo "streets-lambda-sem-$v-0|tgcf_da tgcf_da_se|cfg.yaml gan.lambda_sem=$v fseg.checkpoint=runs/streets-0/gan/fseg/last.pt"; done
  for v in 0 1 10 30; do echo "streets-delta-con-$v-0|tgcf_da_se|cfg.yaml selfens.delta_con=$v|images streets-0"; done
  echo "streets-fseg-no-jitter-0|tgcf_da tgcf_da_se|cfg.yaml fseg.jitter=0"
  for v in 0 10; do echo "carla-lambda-sem-$v-0|tgcf_da tgcf_da_se|$carla gan.lambda_sem=$v fseg.checkpoint=runs/carla-0/gan/fseg/last.pt"; done
  echo "carla-delta-con-0-0|tgcf_da_se|$carla selfens.delta_con=0|images carla-0"
  for method in reinhard fda; do echo "carla-$method-0|tgcf_da tgcf_da_se|$carla augment.method=$method"; done
  # f_seg of another seed, which says whether augmented images keep their labels
  echo "streets-judge-100||cfg.yaml gan.steps=0"
  echo "idd-judge-100||$idd gan.steps=0"
  echo "carla-judge-100||$carla gan.steps=0"
}

# stage RUN NAME COMMAND ...: runs the command once; a stage that is finished has left runs/RUN/done/NAME
stage() {
  local run=$1 name=$2 start=$SECONDS
  shift 2
  [ -e "runs/$run/done/$name" ] && return 0
  echo "== $run: $name: python $*"
  python "$@" || return
  mkdir -p "runs/$run/done" && touch "runs/$run/done/$name"
  printf '%s\t%s\t%.1f\t%s threads\n' "$run" "$name" "$(((SECONDS - start) / 6))e-1" "${OMP_NUM_THREADS:-all}" >> runs/minutes.tsv
}

row_of() { rows | grep "^$1|" || { echo "no row $1; bash experiments.sh list" >&2; return 1; }; }

# arguments RUN: its config and keys
arguments() { local row; row=$(row_of "$1") && echo "$(cut -d'|' -f3 <<< "$row") name=$1 seed=${1##*-}"; }

# borrow RUN WHAT FROM: runs/RUN/WHAT is a link to the other run's
borrow() { mkdir -p "runs/$1" && { [ -e "runs/$1/$2" ] || ln -s "../$3/$2" "runs/$1/$2"; }; }

gan() {
  local from given
  from=$(row_of "$1" | cut -d'|' -f4)
  if [ -n "$from" ]; then gan "${from#* }" && borrow "$1" gan "${from#* }"; return; fi
  given=$(arguments "$1" | grep -o 'fseg.checkpoint=runs/[^/]*' | cut -d/ -f2)
  if [ -n "$given" ]; then gan "$given" || return; fi
  stage "$1" gan train_gan.py $(arguments "$1")
}

images() {
  local from judge
  from=$(row_of "$1" | cut -d'|' -f4)
  if [[ $from == images* ]]; then images "${from#* }" && gan "$1" && borrow "$1" augmented "${from#* }"; return; fi
  judge=${1%%-*}-judge-100
  if [[ $(arguments "$1") == *augment.folder=* ]]; then
    stage "$1" translate tests/match_histograms.py $(arguments "$1") --out "runs/$1/translated" || return
  fi
  { [[ $(arguments "$1") == *augment.method=* ]] || gan "$1"; } && stage "$1" augment augment.py $(arguments "$1") &&
    gan "$judge" && stage "$1" judge evaluate.py $(arguments "$1") --augmented "runs/$judge/gan/fseg/last.pt"
}

run_row() {
  local run=$1 variants keys V
  variants=$(row_of "$run" | cut -d'|' -f2) keys=$(arguments "$run")
  # f_seg's trunk, or its reading of the target
  if [[ $keys == *pretrained=fseg* || $keys == *content=* || $keys == *_plus.yaml* || -z $variants ]]; then gan "$run" || return; fi
  for V in $variants; do
    if [[ $V == tgcf_* ]]; then images "$run" || return; fi
    stage "$run" "train-$V" train_selfens.py $keys selfens.variant=$V &&
      stage "$run" "evaluate-$V" evaluate.py $keys selfens.variant=$V --split val || return
    if [[ $keys == *snapshot_every* && ($V == self_ensembling || $V == tgcf_da_se) ]]; then
      stage "$run" "curve-$V" evaluate.py $keys selfens.variant=$V --split val --curve || return
    fi
  done
}

table() {
  local pair found
  for pair in streets idd carla; do
    found=$(rows | cut -d'|' -f1 | grep "^$pair-" | while read -r r; do compgen -G "runs/$r/eval/*.json" > /dev/null && echo "runs/$r"; done)
    if [ -n "$found" ]; then python evaluate.py --table $found; fi
  done
}

figures() {
  local pair found figure S
  for pair in streets idd idd-plus carla carla-plus; do
    found=$(for S in 0 1 2; do [ -e "runs/$pair-$S/done/evaluate-target_only" ] && echo "runs/$pair-$S"; done)
    [ -n "$found" ] || continue
    python figures.py share $found --out docs/share-$pair.png
    if [ -e "runs/$pair-0/done/curve-tgcf_da_se" ]; then python figures.py curve $found --out docs/curve-$pair.png; fi
    for figure in variants training styles; do  # of streets to docs/; pictures of other data stay in the run folder
      python figures.py $figure $(arguments "$pair-0") $([ $pair = streets ] && echo --out docs/$figure-streets.png)
    done
  done
}

mkdir -p runs
case ${1:-} in
  list) rows | column -t -s '|' ;;
  table) table ;;
  figures) mkdir -p docs && figures ;;
  "") sed -n '2,12p' "$0" ;;
  *)
    failed=0
    for wanted in "$@"; do
      found=0
      for run in $(rows | cut -d'|' -f1); do
        if [[ $wanted == all || $run == $wanted ]]; then
          found=1
          run_row "$run" || { echo "== $run: stopped here" >&2; failed=1; }
        fi
      done
      if [ $found = 0 ]; then echo "no row $wanted; bash experiments.sh list" >&2; failed=1; fi
    done
    exit $failed
    ;;
esac

# What RESULTS.md shows of `evaluate.py --table`: run, variant, runs, mIoU ± deviation, gap, and >10 where it differs;
# then differences ± interval, but target_only's.
/, teacher:/ { if (!/target_only/) print $1, $2, "over", $4, $7 $8 $9; next }
/ teacher / { print $1, $2, $6, $7 $8 $9 ($10 ~ /^-?[0-9]+$/ ? " " $10 ($11 == $7 ? "" : " " $11) : "") }

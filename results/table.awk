# Markdown tables of what `python evaluate.py --table RUN ...` prints, for the variants of the paper:
#     ... | awk -v show="miou over" -f results/table.awk
# Of val, or of val+test where that was evaluated. show is any of
#     miou      mean ± deviation over the seeds, the most of which stand behind the run
#     gap       % of the way from Source Only to Target Only; mIoU of the classes that Target Only reads above 10
#     over      differences within a run ± 95 % interval; bold where resolved
#     between   differences of a variant from that of the first run, the same
#     others    differences of MCD and DCAN, alone and with SE, from TGCF-DA, the same
#     class     each class's IoU, of one run
BEGIN {
    n = split("source_only self_ensembling tgcf_da tgcf_da_se target_only", key)
    columns = split("Source Only,SE,TGCF-DA,TGCF-DA + SE,Target Only", column, ",")
    for (i = 1; i <= n; i++) name[key[i]] = column[i]
    for (i = 1; i < n; i++) for (k = i + 1; k < n; k++) column[++columns] = column[k] " over " column[i]
    title["miou"] = "|mIoU, % (seeds)|"
    title["gap"] = "|gap, %; > 10|"
    title["over"] = title["between"] = title["others"] = "|difference, points|"
    title["class"] = "|IoU, %|"
    splits["val"]; splits["val,"]; splits["val+test"]; splits["val+test,"]      # the later lines replace val's
}

function put(table, row, col, text) {
    if (!(table SUBSEP row in number)) rows[table, number[table, row] = ++count[table]] = row
    used[table, col]
    cell[table, row, col] = text
}

$1 == "run" { for (classes = 0; 10 + classes <= NF; classes++) class[classes] = $(10 + classes); first = "" }

$3 == "teacher" && $4 in splits && $2 in name {
    if (!first) first = $1
    put("miou", $1, name[$2], $7 ($6 > 1 ? "±" $9 : ""))
    if ($6 > seeds[$1]) seeds[$1] = $6
    if ($10 ~ /^-?[0-9]+$/) put("gap", $1, name[$2], $10 "; " $11)
    for (i = 0; i < classes; i++) put("class", class[i], name[$2], $(NF - classes + 1 + i))
}

$3 == "over" && $5 in splits {
    method = $2
    se = sub(/_se$/, "", method) ? "_se" : ""
    base = substr($4, 1, length($4) - 1)
    text = /not resolved/ ? $7 "±" $9 : "**" $7 "±" $9 "**"
    if ($2 in name && base in name && $2 != "target_only") put("over", $1, name[$2] " over " name[base], text)
    if ($2 in name && base == first) put("between", $1 " over " base, name[$2], text)
    if (method ~ /^(mcd|dcan)$/ && base == "tgcf_da" se) put("others", $1 " " method " over " $1, name[base], text)
}

END {
    tables = split(show, shown)
    for (t = 1; t <= tables; t++) {
        table = shown[t]
        head = title[table]
        rule = "|---|"
        for (c = 1; c <= columns; c++) if ((table, column[c]) in used) { head = head column[c] "|"; rule = rule "---|" }
        print head "\n" rule
        for (r = 1; r <= count[table]; r++) {
            line = "|" rows[table, r] (table == "miou" ? " (" seeds[rows[table, r]] ")" : "") "|"
            for (c = 1; c <= columns; c++) if ((table, column[c]) in used) line = line cell[table, rows[table, r], column[c]] "|"
            print line
        }
        print ""
    }
}

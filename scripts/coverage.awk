# From lines with their counts, file after file: covered lines of each crate, and of each room of the server. Tests do not count.
/^[^ ].*\.rs$/ {
    path = $0
    if (index(path, root) == 1) path = substr(path, length(root) + 1)
    room = ""
    if (path !~ /(^|\/)(generated|tests|benches)\// && path !~ /(^|\/)tests\.rs$/) {
        if (match(path, /^(crates\/[a-z]+|jepsen)\/src\//)) room = substr(path, 1, RLENGTH - 5)
        else if (match(path, /^src\/[a-z_]+(\.rs|\/)/)) room = substr(path, 1, RLENGTH)
        sub(/\/$/, "", room)
    }
    in_tests = 0
    next
}
room == "" { next }
{
    split($0, column, "|")
    text = substr($0, length(column[1]) + length(column[2]) + 3)
    # A module of tests ends its file.
    if (before == "#[cfg(test)]" && text ~ /^mod [a-z_]+ \{/) in_tests = 1
    before = text
    if (in_tests || column[2] !~ /[0-9]/) next
    lines[room]++
    if (column[2] + 0 > 0) covered[room]++
}
END {
    for (room in lines) {
        printf "%-24s %6d of %6d lines  %5.1f %%\n", room, covered[room], lines[room], 100 * covered[room] / lines[room]
        all += lines[room]
        all_covered += covered[room]
    }
    printf "%-24s %6d of %6d lines  %5.1f %%\n", "~ all", all_covered, all, 100 * all_covered / all
}

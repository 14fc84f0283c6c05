#!/usr/bin/awk -f
# From lcov's format: covered lines of each crate, and of each room of the server.
/^SF:/ {
    path = substr($0, 4)
    if (match(path, /(^|\/)(crates\/[a-z]+|jepsen)\/src\//)) {
        room = substr(path, RSTART, RLENGTH)
        gsub(/^\/|\/src\/$/, "", room)
    } else if (match(path, /(^|\/)src\/[a-z_]+(\.rs|\/)/)) {
        room = substr(path, RSTART, RLENGTH)
        gsub(/^\/|\/$/, "", room)
    } else {
        room = ""
    }
}
/^DA:/ && room != "" {
    split(substr($0, 4), line, ",")
    lines[room]++
    if (line[2] > 0) covered[room]++
}
END {
    for (room in lines) {
        printf "%-24s %6d of %6d lines  %5.1f %%\n", room, covered[room], lines[room], 100 * covered[room] / lines[room]
        all += lines[room]
        all_covered += covered[room]
    }
    printf "%-24s %6d of %6d lines  %5.1f %%\n", "~ all", all_covered, all, 100 * all_covered / all
}

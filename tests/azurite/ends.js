// Azurite ends with the process that it was started by, also when that one is killed: then its standard input ends.
process.stdin.on("end", () => process.exit()).resume();

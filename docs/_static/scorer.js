// The order of what a search finds: a class or function before the pages that mention it, and
// one whose name begins with what was asked before one that has it within.
var Scorer = {
  objNameMatch: 60,
  objPartialMatch: 45,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([docname, title, anchor, description, score]) => {
    const asked = new URLSearchParams(window.location.search).get("q");
    const name = title.toLowerCase().split(".").pop();
    return score + (asked && name.startsWith(asked.toLowerCase()) ? 3 : 0);
  },
};

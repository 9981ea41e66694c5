// The administrator's page; texts are shown with textContent.
"use strict";

const $ = (id) => document.getElementById(id);
const token = decodeURIComponent(location.hash.slice(1));

async function ask(path) {
  const response = await fetch(path, { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

function table(id, heads, rows) {
  const line = (cells, tag) => {
    const row = document.createElement("tr");
    for (const { text, bad } of cells) {
      const cell = document.createElement(tag);
      cell.textContent = text;
      if (tag === "th") cell.scope = "col";
      if (bad) cell.className = "bad";
      row.append(cell);
    }
    return row;
  };
  const plain = (cell) => (cell !== null && typeof cell === "object" ? cell : { text: cell === null ? "" : `${cell}` });
  if (!rows.length) rows = [heads.map((_, n) => (n ? "" : "none yet"))];
  $(id).replaceChildren(line(heads.map(plain), "th"), ...rows.map((row) => line(row.map(plain), "td")));
}

const share = (value) => (value === null ? "" : `${Math.round(100 * value)} %`);

async function refresh() {
  try {
    const told = await (await ask("/api/admin/overview")).json();
    $("trouble").textContent = "";
    $("bar").max = Math.max(told.wanted, 1);
    $("bar").value = told.labels;
    $("done").textContent = `${told.labels} of ${told.wanted} labels, ${told.tasks_done} of ${told.tasks} tasks complete,`
      + ` ${told.controls} controls`;
    table("annotators", ["annotator", "labels", "skipped", "flagged", "left", "median time", "controls right", ""],
      told.annotators.map((a) => [a.annotator, a.label, a.skip, a.flag, a.left,
        a.median_seconds === null ? "" : `${Math.round(a.median_seconds)} s`,
        a.controls ? `${share(a.controls_passed)} of ${a.controls}` : "",
        a.screened ? { text: "below the pass mark", bad: true } : ""]));
    const number = (value) => (value === null ? "not defined" : value.toFixed(3));
    table("agreement", ["measure", "value", "95 % interval"], Object.entries(told.agreement || {}).map(([name, v]) =>
      [name.replaceAll("_", " "), number(v.value), v.low === null ? "" : `${number(v.low)} to ${number(v.high)}`]));
    table("flags", ["task", "annotator", "reason"], told.flags.map((f) => [f.task, f.annotator, f.reason]));
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

async function download(form) {
  try {
    const response = await ask(`/api/admin/export?form=${form}&screened=${$("screened").checked ? 1 : 0}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `${form}.jsonl`;
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

$("labels").addEventListener("click", () => download("labels"));
$("pairs").addEventListener("click", () => download("pairs"));
refresh();
setInterval(refresh, 10000);

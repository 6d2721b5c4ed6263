// The report is complete without this script. It adds tool tips that follow the pointer, a cursor in the loss curves,
// the download of the data, and opens folded sections for printing.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const tip = document.getElementById("tip");

  function show(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 16 + box.width < innerWidth;
    tip.style.left = Math.max(8, right ? event.clientX + 16 : event.clientX - box.width - 12) + "px";
    tip.style.top = Math.max(8, Math.min(event.clientY + 16, innerHeight - box.height - 8)) + "px";
  }
  function hide() { tip.hidden = true; }

  for (const title of document.querySelectorAll("svg.chart title")) {
    const shape = title.parentNode, text = title.textContent;
    title.remove(); // or the browser shows a second one
    shape.setAttribute("aria-label", text);
    shape.addEventListener("pointermove", (event) => { event.stopPropagation(); show(text, event); });
    shape.addEventListener("pointerleave", hide);
  }

  function mean(curves, step) { // of the seeds, each at its point nearest to the step
    const values = Object.values(curves).map(([steps, losses]) => {
      let best = 0;
      for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
      return losses[best];
    });
    return values.reduce((a, b) => a + b, 0) / values.length;
  }
  function nearest(curves, step) {
    const steps = Object.values(curves)[0][0];
    return steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a), steps[0]);
  }

  for (const svg of document.querySelectorAll("svg[data-geometry]")) {
    const [low, high, start, end, top, bottom] = svg.dataset.geometry.split(" ").map(Number);
    const arms = data.arms.filter((arm) => (arm.curves[svg.dataset.split] || null) && (!svg.dataset.arm || arm.name === svg.dataset.arm));
    if (!arms.length) continue;
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top); cursor.setAttribute("y2", bottom);
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (at.x < start - 4 || at.x > end + 4) { cursor.remove(); hide(); return; }
      const step = nearest(arms[0].curves[svg.dataset.split], low + ((at.x - start) / (end - start)) * (high - low));
      const x = start + ((step - low) / (high - low)) * (end - start);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
      svg.append(cursor);
      const lines = arms.map((arm) => [arm.name, mean(arm.curves[svg.dataset.split], step)]).sort((a, b) => a[1] - b[1]);
      show(`step ${Math.round(step)}\n` + lines.map(([name, loss]) => `${loss.toFixed(4)}  ${name}`).join("\n"), event);
    });
    svg.addEventListener("pointerleave", () => { cursor.remove(); hide(); });
  }

  const link = document.getElementById("download");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  link.hidden = false;
  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
})();

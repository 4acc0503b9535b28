// Show the values of all curves of a chart at the pointer.
for (const svg of document.querySelectorAll(".chart svg[data-x0]")) {
  const figure = svg.closest("figure"), cursor = svg.querySelector(".cursor"), tip = document.createElement("div");
  const { x0, x1, left, right, xlabel } = svg.dataset;
  const curves = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name, points: JSON.parse(line.dataset.points),
  }));
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = +x0 + (place - left) / (right - left) * (x1 - x0);
    const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const at = near(curves.flatMap((curve) => curve.points))[0];
    const rows = curves.map((curve) => `${curve.name}: ${near(curve.points)[1]}`);
    tip.textContent = [`${xlabel} ${at}`, ...rows].join("\n");
    const line = +left + (at - x0) / (x1 - x0) * (right - left);
    cursor.setAttribute("x1", line);
    cursor.setAttribute("x2", line);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const aside = event.clientX - box.left > box.width / 2 ? -tip.offsetWidth - 14 : 14;
    tip.style.left = Math.max(0, Math.min(event.clientX - figure.getBoundingClientRect().left + aside, figure.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = event.clientY - figure.getBoundingClientRect().top + 12 + "px";
  });
}

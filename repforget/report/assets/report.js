"use strict";
// Replace each static picture by its interactive form; without this script the static one stays.
document.querySelectorAll("[data-figure]").forEach(function (holder) {
  const source = document.getElementById("figure-" + holder.dataset.figure);
  const figure = JSON.parse(source.textContent);
  holder.replaceChildren();
  Plotly.newPlot(holder, figure.data, figure.layout, {
    responsive: true,
    displayModeBar: "hover",
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: holder.dataset.figure },
  });
});

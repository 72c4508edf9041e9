"use strict";
// Point at a node to see its edges alone, click to keep them; without this script the picture is whole.
document.querySelectorAll("svg").forEach(function (picture) {
  const edges = Array.from(picture.querySelectorAll(".edge"));
  let kept = null;
  function show(node) {
    edges.forEach(function (edge) {
      const mine = node === null || edge.dataset.ends.split(" ").includes(node);
      edge.setAttribute("stroke-opacity", mine ? (node === null ? "0.6" : "0.9") : "0.06");
    });
  }
  picture.querySelectorAll(".node").forEach(function (part) {
    part.addEventListener("mouseenter", function () { show(part.dataset.node); });
    part.addEventListener("mouseleave", function () { show(kept); });
    part.addEventListener("click", function () {
      kept = kept === part.dataset.node ? null : part.dataset.node;
      show(kept);
    });
  });
});

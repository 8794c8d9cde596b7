// Plays every row of clips in step: one clock, so that the same seed is at the same frame in every row.
(function () {
  "use strict";
  var GAP = 3, ENLARGE = 4;
  var player = document.querySelector(".player");
  if (!player) return;
  var button = player.querySelector("button");
  var slider = player.querySelector("input[type=range]");
  var trails = player.querySelector("input[type=checkbox]");
  var reels = [];
  var frame = 0, last = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  function draw() {
    reels.forEach(function (reel) {
      var size = reel.size, step = size * ENLARGE, pen = reel.canvas.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.clearRect(0, 0, reel.canvas.width, reel.canvas.height);
      for (var clip = 0; clip < reel.count; clip++) {
        var left = clip * (step + GAP);
        pen.drawImage(reel.sheet, frame * size, clip * size, size, size, left, 0, step, step);
        if (!trails.checked) continue;
        pen.strokeStyle = reel.colour;
        pen.fillStyle = reel.colour;
        pen.lineWidth = 2.5;
        pen.lineJoin = "round";
        pen.beginPath();
        reel.paths[clip].forEach(function (point, index) {
          var x = left + (point[0] + 0.5) * ENLARGE, y = (point[1] + 0.5) * ENLARGE;
          if (index) pen.lineTo(x, y); else pen.moveTo(x, y);
        });
        pen.stroke();
        reel.paths[clip].forEach(function (point, index) {
          pen.beginPath();
          pen.arc(left + (point[0] + 0.5) * ENLARGE, (point[1] + 0.5) * ENLARGE, index === frame ? 6 : 3, 0, 7);
          pen.fill();
        });
      }
    });
    slider.value = frame;
  }

  function tick(now) {
    if (playing && now - last > 160) {
      last = now;
      frame = (frame + 1) % (Number(slider.max) + 1);
      draw();
    }
    requestAnimationFrame(tick);
  }

  function show() {
    button.textContent = playing ? "Pause" : "Play";
    draw();
  }

  button.addEventListener("click", function () { playing = !playing; show(); });
  slider.addEventListener("input", function () { playing = false; frame = Number(slider.value); show(); });
  trails.addEventListener("change", draw);

  var waiting = 0;
  player.querySelectorAll(".reel").forEach(function (row) {
    var canvas = row.querySelector("canvas"), sheet = new Image();
    waiting++;
    sheet.onload = function () {
      var count = Number(canvas.dataset.count), size = sheet.height / count;
      canvas.width = count * (size * ENLARGE + GAP) - GAP;
      canvas.height = size * ENLARGE;
      reels.push({
        canvas: canvas, sheet: sheet, count: count, size: size, paths: JSON.parse(canvas.dataset.paths),
        colour: getComputedStyle(row).getPropertyValue("--clip-tone").trim() || "#7fb2ff"
      });
      if (--waiting === 0) { show(); requestAnimationFrame(tick); }
    };
    sheet.src = canvas.dataset.sheet;
  });
}());
